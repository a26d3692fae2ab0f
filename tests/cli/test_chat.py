"""A talk goes on whatever happens to one answer: a full context, Ctrl-C, a refusal; commands are not questions."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pydflash import cli
from pydflash.cli.chat import Talk
from pydflash.cli.options import SamplingChoice
from pydflash.decode import SamplingParams, Stats
from pydflash.engine import Chunk, Engine, Piece
from pydflash.errors import NativeError, SessionClosed, TemplateError
from pydflash.files import GGUFFile, TensorSource, write_gguf
from pydflash.text.chat import ChatTemplate

THINKING = """
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if m.role == 'assistant' %}{{ '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' }}{% endif %}
{{- m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def narrow(target_path: Path) -> Iterator[Engine]:
    """An engine whose context holds two or three short turns."""
    with Engine.load(target_path, device="cpu", threads=1, max_context=160, environment={}) as engine:
        yield engine


def talk_with(engine: Engine, max_tokens: int = 8, think: bool | None = None) -> Talk:
    return Talk(engine, SamplingParams(max_tokens=max_tokens, ignore_eos=True), "be brief", think, stats=False)


def rewritten(source: Path, path: Path, metadata: dict[str, Any]) -> Path:
    """A copy of a model's file with other metadata."""
    with GGUFFile.open(source) as file:
        chunks = {name: partial(iter, [file.data(name).reshape(-1)]) for name in file.tensors}
        tensors = [TensorSource(name, info.shape, info.type, chunks[name]) for name, info in file.tensors.items()]
        write_gguf(path, {**file.metadata, **metadata}, tensors)
    return path


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)


def questions(talk: Talk) -> list[str]:
    return [message["content"] for message in talk.messages if message["role"] == "user"]


def answering(*answers: Chunk | BaseException) -> Callable[..., Iterator[Chunk]]:
    """A stream of one chunk, or an error, for each call."""
    pending = list(answers)

    def stream(*_: Any, **__: Any) -> Iterator[Chunk]:
        answer = pending.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        yield answer

    return stream


def chunk(text: str, reasoning: str = "", reason: Any = "stop") -> Chunk:
    return Chunk(text, (1,), (False,), (Piece(text, False, reasoning),), Stats(), reason, reasoning)


# --- a full context ---------------------------------------------------------------------------------------------------


def fill(talk: Talk) -> int:
    """Ask until there is no room for another question; returns how many were answered."""
    count = 0
    while talk._tokens(0, f"question {count}") <= talk._context:
        talk.respond(f"question {count}")
        count += 1
    return count


def test_without_a_terminal_the_oldest_turns_give_way(narrow: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(narrow)
    count = fill(talk)
    assert count >= 2
    assert capsys.readouterr().err == ""
    talk.respond(f"question {count}")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "more than the context of 160 (--max-context)" in said
    assert talk.messages[0] == {"role": "system", "content": "be brief"}
    asked = questions(talk)
    assert asked == [f"question {i}" for i in range(count + 1)][-len(asked) :]
    assert 1 <= len(asked) <= count
    assert [message["role"] for message in talk.messages[1:]] == ["user", "assistant"] * len(asked)


def test_on_a_terminal_they_wait_for_the_command(
    narrow: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch)
    talk = talk_with(narrow)
    count = fill(talk)
    talk.respond("one more?")
    assert "/drop" in capsys.readouterr().err
    assert len(questions(talk)) == count
    talk.respond("/drop")
    assert "forgotten" in capsys.readouterr().err
    assert questions(talk)[-1] == "one more?"
    assert talk.messages[-1]["role"] == "assistant"
    talk.respond("/drop")
    assert "no question waits" in capsys.readouterr().err


def test_no_more_turns_are_dropped_than_an_answer_needs(narrow: Engine) -> None:
    talk = talk_with(narrow)
    count = fill(talk)
    dropped = talk._turns_to_drop("one more?")
    assert 1 <= dropped <= count
    room = talk._context - 8  # --max-tokens
    assert talk._tokens(dropped, "one more?") <= room < talk._tokens(dropped - 1, "one more?")


def test_a_question_that_cannot_fit_is_refused_and_nothing_forgotten(
    narrow: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = talk_with(narrow)
    talk.respond("hi")
    talk.respond("0" * 400)
    said = capsys.readouterr().err
    assert "the question is not asked" in said
    assert "--max-context" in said
    assert questions(talk) == ["hi"]


def test_an_answer_that_fills_the_context_says_so(narrow: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(narrow, max_tokens=1000)
    talk.respond("hi")
    assert "the context of 160 tokens (--max-context) is full" in capsys.readouterr().err


# --- what ends an answer and not the talk -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "stopped before the answer"),
        (TemplateError("the template refuses"), "error: the template"),
    ],
)
def test_a_question_without_an_answer_is_forgotten(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    line: str,
) -> None:
    monkeypatch.setattr(engine, "stream", answering(error, chunk("yes")))
    talk = talk_with(engine)
    talk.respond("one")
    assert capsys.readouterr().err.startswith(line)
    talk.respond("two")
    assert questions(talk) == ["two"]


@pytest.mark.parametrize("error", [NativeError("NaN"), SessionClosed("closed")])
def test_an_engine_that_cannot_go_on_ends_the_talk(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(engine, "stream", answering(error))
    with pytest.raises(type(error)):
        talk_with(engine).respond("one")


def test_what_was_said_before_control_c_is_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[Chunk]:
        yield chunk("half an", reason=None)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", stream)
    talk = talk_with(engine)
    talk.respond("one")
    assert talk.messages[-1] == {"role": "assistant", "content": "half an"}


def test_a_model_without_a_template_is_refused_before_the_first_question(
    target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(target_path, tmp_path / "plain.gguf", {"tokenizer.chat_template": ""})
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", str(path), "--device", "cpu", "--threads", "1"])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert "no chat template" in shown.err


# --- reasoning --------------------------------------------------------------------------------------------------------


def test_reasoning_goes_back_apart_from_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "stream", answering(chunk("four", "two and two"), chunk("yes")))
    talk = talk_with(engine)
    talk.respond("2+2?")
    talk.respond("sure?")
    assert [message for message in talk.messages if message["role"] == "assistant"] == [
        {"role": "assistant", "content": "four", "reasoning_content": "two and two"},
        {"role": "assistant", "content": "yes"},
    ]


def test_reasoning_without_an_answer_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "stream", answering(chunk("", "two and", "length")))
    talk_with(engine).respond("2+2?")
    shown = capsys.readouterr()
    assert shown.out == "\n"
    assert "the reasoning took all 8 tokens (--max-tokens)" in shown.err


def test_reasoning_is_dimmed_on_a_terminal(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(engine, "stream", answering(chunk("four", "two and two")))
    talk_with(engine).respond("2+2?")
    assert capsys.readouterr().out == "\x1b[2mtwo and two\x1b[0m\n\nfour\n"


@pytest.mark.parametrize(("think", "ending"), [(None, "<think>\n"), (True, "<think>\n"), (False, "</think>\n\n")])
def test_thinking_is_an_option(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, think: bool | None, ending: str
) -> None:
    monkeypatch.setattr(engine, "_chat_template", ChatTemplate(THINKING))
    talk = talk_with(engine, think=think)
    asked: list[dict[str, Any]] = []

    def stream(*_: Any, variables: Any, **options: Any) -> Iterator[Any]:
        asked.append(variables)
        return iter([chunk("four")])

    monkeypatch.setattr(engine, "stream", stream)
    talk.respond("2+2?")
    prompt = engine.encode([{"role": "user", "content": "2+2?"}], variables=asked[0])
    assert engine.tokenizer.decode(prompt).endswith(ending)


def test_a_template_without_the_switch_is_told(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    talk_with(engine, think=True)
    assert "does not know enable_thinking" in capsys.readouterr().err


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands_are_not_questions(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(engine)
    talk.respond("hi")
    for command, words in (("/help", "/clear"), ("/nope", "no command /nope"), ("/nope at all", "no command /nope")):
        capsys.readouterr()
        talk.respond(command)
        shown = capsys.readouterr()
        assert words in shown.err
        assert shown.out == ""
    assert questions(talk) == ["hi"]
    talk.respond("/clear")
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    for question in ("/usr/bin is a folder", " /help me", "1/2", "/* a comment"):
        talk.respond(question)
        assert questions(talk)[-1] == question


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_options_go_over_the_file_which_goes_over_the_command() -> None:
    choice = SamplingChoice({"top_p": 0.5}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8})
    params = choice.params({"temperature": 1.0, "top_p": 0.95})
    assert (params.temperature, params.top_k, params.top_p) == (1.0, 20, 0.5)
    assert choice.params().temperature == 0.7


@pytest.fixture
def recommending(target_path: Path, tmp_path: Path) -> Path:
    """The model's file with sampling settings of its author, one of them of no use."""
    keys = {"temp": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 7.0}
    return rewritten(
        target_path, tmp_path / "recommending.gguf", {f"general.sampling.{key}": v for key, v in keys.items()}
    )


@pytest.mark.parametrize("command", ["chat", "generate", "info", "explain"])
def test_what_a_file_recommends_is_used_and_shown(
    recommending: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[SamplingParams] = []

    def stream(engine: Engine, prompt: Any, params: SamplingParams, **_: Any) -> Iterator[Chunk]:
        seen.append(params)
        yield chunk("yes")

    monkeypatch.setattr(Engine, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    options = {"chat": ["--top-k", "3"], "generate": ["--top-k", "3"]}
    arguments = [command, str(recommending), *options.get(command, [])]
    with pytest.raises(SystemExit):
        cli.main(arguments if command == "info" else [*arguments, "--device", "cpu", "--threads", "1"])
    shown = capsys.readouterr()
    if command in options:
        assert [(p.temperature, p.top_k, p.top_p, p.min_p) for p in seen] == [(1.0, 3, 0.95, 0.0)]
        assert "as the model file recommends: temperature 1.0, top_p 0.95\n" in shown.err
        assert "general.sampling.min_p = 7.0, not used: min_p is 7.0; allowed" in shown.err
    else:
        lines = {" ".join(line.split()[:2]): line for line in shown.out.splitlines()}
        assert "1.0" in lines["recommended temperature"]
        assert "40" in lines["recommended top_k"]
        assert "7.0, not used" in lines["recommended min_p"]
