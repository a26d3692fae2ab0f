"""An answer to messages comes in two parts, reasoning and text, whatever its tokens are; stop strings end the text."""

from __future__ import annotations

import pytest

from pydflash.decode import SamplingParams, Step
from pydflash.engine import Engine
from pydflash.engine.completion import AnswerText, chunk_of
from pydflash.text import Tokenizer
from pydflash.text.chat import ChatTemplate
from pydflash.text.reasoning import ReasoningSplitter
from tools.synth.vocabulary import CONTROL, build_vocabulary

ANSWER = "two and two\nSTOP\n</think>\n\nfour STOP five"
MESSAGES = [{"role": "user", "content": "2+2?"}]
THINKING = """
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{{- '<|im_start|>assistant\\n<think>\\n' }}{% if enable_thinking is false %}{{ '\\n</think>\\n\\n' }}{% endif %}"""


@pytest.fixture(scope="module", params=["added", "control", "text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One whose marks are tokens that appear in text, tokens that do not, or several tokens."""
    vocabulary = build_vocabulary(512)
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    for mark in ("<think>", "</think>"):
        at = tokens.index(mark)
        if request.param == "control":
            types[at] = CONTROL
        elif request.param == "text":
            tokens[at], types[at] = f"[none of {mark}]", CONTROL
    return Tokenizer(tokens, vocabulary.merges, types, pre="qwen35")


def answered(tokenizer: Tokenizer, answer: str, *stop: str, inside: bool = True, step: int = 3) -> tuple[str, str, str]:
    """Reasoning, text and why it ended, of the answer's tokens in steps of ``step``."""
    text = AnswerText(tokenizer, stop, ReasoningSplitter(inside))
    ids, reasoning, content = tokenizer.encode(answer), "", ""
    for start in range(0, len(ids), step):
        tokens = tuple(ids[start : start + step])
        chunk = chunk_of(Step(tokens, finish_reason="length" if start + step >= len(ids) else None), text)
        assert "".join(piece.text for piece in chunk.pieces) == chunk.text
        assert "".join(piece.reasoning for piece in chunk.pieces) == chunk.reasoning
        reasoning, content = reasoning + chunk.reasoning, content + chunk.text
        if chunk.finish_reason is not None:
            break
    return reasoning, content, str(chunk.finish_reason)


@pytest.mark.parametrize("step", [1, 2, 5, 99])
def test_the_parts_do_not_depend_on_steps(tokenizer: Tokenizer, step: int) -> None:
    assert answered(tokenizer, ANSWER, step=step) == ("two and two\nSTOP", "four STOP five", "length")
    opened = answered(tokenizer, "<think>\n" + ANSWER, inside=False, step=step)
    assert opened == ("two and two\nSTOP", "four STOP five", "length")


@pytest.mark.parametrize("step", [1, 2, 5, 99])
def test_a_stop_string_ends_text_and_not_reasoning(tokenizer: Tokenizer, step: int) -> None:
    assert answered(tokenizer, ANSWER, "STOP", step=step) == ("two and two\nSTOP", "four ", "stop")
    assert answered(tokenizer, ANSWER, "two and", step=step)[2] == "length"
    assert answered(tokenizer, "STOP, I thought", "STOP", inside=False) == ("", "", "stop")


def test_newlines_after_the_mark_do_not_end_the_text_before_it_begins(tokenizer: Tokenizer) -> None:
    assert answered(tokenizer, ANSWER + "\n\nsix", "\n\n") == ("two and two\nSTOP", "four STOP five", "stop")


def test_a_held_back_start_of_a_stop_string_is_not_lost_at_the_mark(tokenizer: Tokenizer) -> None:
    assert answered(tokenizer, ANSWER, "fourteen", "STOP\n!") == ("two and two\nSTOP", "four STOP five", "length")


def test_a_stop_string_that_names_the_mark_or_a_control_token_ends_reasoning() -> None:
    vocabulary = build_vocabulary(512)
    tokenizer = Tokenizer(vocabulary.tokens, vocabulary.merges, vocabulary.types, pre="qwen35")
    assert answered(tokenizer, ANSWER, "</think>") == ("two and two\nSTOP", "", "stop")
    assert answered(tokenizer, "two<|im_start|>" + ANSWER, "<|im_start|>") == ("two", "", "stop")


def test_reasoning_that_never_ends_leaves_no_text(tokenizer: Tokenizer) -> None:
    assert answered(tokenizer, "two and two\nSTOP, four", "STOP") == ("two and two\nSTOP, four", "", "length")


# --- of an engine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def thinking(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine, its model's template replaced by one whose prompts open reasoning."""
    monkeypatch.setattr(engine, "_chat_template", ChatTemplate(THINKING))
    return engine


def params_with(engine: Engine, **bias: float) -> SamplingParams:
    """Greedy, with values added to the logits of the marks."""
    marks = {"opening": "<think>", "closing": "</think>"}
    ids = {engine.tokenizer.token_id(marks[name]): value for name, value in bias.items()}
    return SamplingParams(max_tokens=12, ignore_eos=True, logit_bias={t: v for t, v in ids.items() if t is not None})


def test_an_answer_that_starts_inside_reasoning_is_split(thinking: Engine) -> None:
    never = thinking.generate(MESSAGES, params_with(thinking, closing=-100.0))
    assert never.text == ""
    assert never.reasoning.strip("\r\n") == thinking.tokenizer.decode(never.tokens, skip_special=True).strip("\r\n")
    at_once = thinking.generate(MESSAGES, params_with(thinking, closing=100.0))
    assert (at_once.reasoning, at_once.text) == ("", "</think>" * 11)
    chunks = list(thinking.stream(MESSAGES, params_with(thinking, closing=-100.0)))
    assert "".join(chunk.reasoning for chunk in chunks) == never.reasoning


def test_an_answer_whose_reasoning_the_prompt_has_closed_is_text(thinking: Engine) -> None:
    params = params_with(thinking, opening=-100.0)
    done = thinking.generate(MESSAGES, params, variables={"enable_thinking": False})
    assert (done.reasoning, done.text) == ("", thinking.tokenizer.decode(done.tokens, skip_special=True))


def test_an_answer_may_open_reasoning_itself(thinking: Engine) -> None:
    params = params_with(thinking, opening=100.0)
    done = thinking.generate(MESSAGES, params, variables={"enable_thinking": False})
    assert (done.reasoning, done.text) == ("<think>" * 11, "")


def test_the_text_after_a_raw_prompt_stays_whole(thinking: Engine) -> None:
    params = params_with(thinking, closing=100.0)
    for prompt in (thinking.encode(MESSAGES), "2+2?<think>\n"):
        done = thinking.generate(prompt, params)
        assert (done.reasoning, done.text) == ("", "</think>" * 12)


def test_without_reasoning_in_the_template_an_answer_stays_whole(engine: Engine) -> None:
    done = engine.generate(MESSAGES, params_with(engine, opening=100.0))
    assert (done.reasoning, done.text) == ("", "<think>" * 12)
