"""Prompt lookup proposes what followed the longest ending that occurred before, and changes no token of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydflash.decode import Sampler, SamplingParams, Stats, autoregressive, collect, speculative
from pydflash.drafts import CycleCosts, NGramDraft, NGramProposer, ProposalLength, load_draft
from pydflash.drafts.ngram import LONGEST, SHORTEST
from pydflash.engine import Engine
from pydflash.models import Model
from pydflash.runtime import Session
from tests.helpers import Pair
from tests.shipped import needs_pair

Load = Callable[..., Model]


def proposed(proposer: NGramProposer, history: Sequence[int], count: int = 4) -> list[int] | None:
    """The tokens after the anchor, or None."""
    proposal = proposer.propose(history, count)
    if proposal is None:
        return None
    anchor, *tokens = proposal.ids.tolist()
    assert anchor == history[-1]
    assert len(proposal) == len(tokens) + 1
    return tokens


def looked_up(history: Sequence[int], count: int) -> list[int] | None:
    """The same by search: the longest ending, its last earlier occurrence, what followed it."""
    text = list(history)
    for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                period = len(text) - place
                return [text[place + i % period] for i in range(count)]
    return None


# --- what is proposed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "tokens"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [4, 5, 6, 7]),
        ([1, 2, 3, 1, 2, 3], [1, 2, 3, 1]),  # the text ends, and is taken to go round once more
        ([1, 2, 1, 2], [1, 2, 1, 2]),
        ([1, 2, 9, 1, 2], [9, 1, 2, 9]),
        ([5, 5, 5], [5, 5, 5, 5]),
        ([7, 5, 5, 5, 5], [5, 5, 5, 5]),
        ([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], [9, 5, 2, 3]),  # three tokens decide, though two occurred later
        ([1, 2, 7, 3, 1, 2, 8, 3, 1, 2], [8, 3, 1, 2]),  # of equal endings the last
        ([4, *range(10, 18), 1, 6, *range(10, 18), 2, 4, *range(10, 18)], [2, 4, 10, 11]),  # nine tokens are too many
    ],
    ids=str,
)
def test_what_followed_the_longest_ending_comes_again(history: list[int], tokens: list[int]) -> None:
    assert proposed(NGramProposer(), history) == tokens == looked_up(history, 4)


@pytest.mark.parametrize(
    "history", [[1], [1, 1], [1, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3, 1], [2, 1, 3, 1, 4, 1]], ids=str
)
def test_a_text_without_repeats_is_left_alone(history: list[int]) -> None:
    assert proposed(NGramProposer(), history) is None


@pytest.mark.parametrize("count", range(1, NGramProposer.limit + 1))
def test_as_many_tokens_are_proposed_as_were_asked_for(count: int) -> None:
    history = [1, 2, 3, 4, 5] * 2
    assert proposed(NGramProposer(), history, count) == ([1, 2, 3, 4, 5] * 3)[:count]
    assert history == [1, 2, 3, 4, 5] * 2


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=12),
    count=st.integers(1, NGramProposer.limit),
)
def test_a_text_read_piece_by_piece_gives_what_a_search_gives(pieces: list[list[int]], count: int) -> None:
    """Also where some pieces are read without a proposal, as steps that fell back are."""
    proposer, history = NGramProposer(), list[int]()
    for i, piece in enumerate(pieces):
        history += piece
        if i % 3 != 1:
            assert proposed(proposer, history, count) == looked_up(history, count)
            assert proposed(proposer, history, count) == looked_up(history, count)  # asking changes nothing


# --- texts ------------------------------------------------------------------------------------------------------------


def test_after_a_reset_nothing_is_remembered() -> None:
    proposer = NGramProposer()
    assert proposed(proposer, [1, 2, 3, 4, 1, 2]) == [3, 4, 1, 2]
    proposer.reset()
    assert proposed(proposer, [1, 2]) is None
    assert proposed(proposer, [1, 2, 9, 1, 2]) == [9, 1, 2, 9]


@pytest.mark.parametrize(
    "other",
    [[1, 2], [8, 8, 1, 2], [1, 2, 3, 4, 1, 9, 1, 2], [6, 5, 4, 3, 7, 1, 2]],
    ids=["a beginning", "a short one", "one that forks", "a longer one"],
)
def test_another_text_is_proposed_for_from_itself_alone(other: list[int]) -> None:
    """Without a reset too: the session went back to a snapshot, or its caller began again."""
    proposer = NGramProposer()
    assert proposed(proposer, [1, 2, 3, 4, 1, 2]) == [3, 4, 1, 2]
    assert proposed(proposer, other) == looked_up(other, 4)
    longer = [*other, 7, 1, 2]
    assert proposed(proposer, longer) == looked_up(longer, 4)


def test_what_a_proposer_must_offer_it_offers() -> None:
    proposer = NGramProposer()
    proposer.commit(3)
    proposer.flush()
    assert proposer.sizes() == {}
    proposer.close()
    proposer.close()


# --- decoding ---------------------------------------------------------------------------------------------------------

REPEATING = [5, 9, 14, 3, 77, 20] * 5
SAMPLERS = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.3},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 5},
}


def both_ways(
    session: Session, proposer: NGramProposer, prompt: list[int], count: int, options: Mapping[str, Any], adaptive: bool
) -> tuple[list[int], Stats]:
    """The tokens with proposals, which are those without, and their stats."""
    vocab = session.model.config.vocab
    wanted, _ = collect(autoregressive(session, prompt, Sampler(SamplingParams(**options), vocab), max_tokens=count))
    session.reset()
    length = ProposalLength(CycleCosts()) if adaptive else None
    sampler = Sampler(SamplingParams(**options), vocab)
    tokens, stats = collect(speculative(session, proposer, prompt, sampler, max_tokens=count, length=length))
    session.reset()
    assert tokens == wanted
    assert stats.tokens == count == 1 + stats.accepted + stats.steps
    return tokens, stats


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(("name", "types"), [("equal", "f32"), ("odd", "q8_0"), ("all_recurrent", "f32")])
def test_any_text_is_the_autoregressive_one(
    model_of: Load, name: str, types: str, options: dict[str, float], adaptive: bool
) -> None:
    with Session(model_of(name, types), 256, "q8_0", "q4_0") as session:
        for prompt in (REPEATING, [3]):
            both_ways(session, NGramProposer(), prompt, 70, options, adaptive)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("allowed", "accepted"), [((7,), 90), ((7, 9), 50), ((7, 9, 40, 200), 15)], ids=str)
def test_proposals_for_a_text_that_repeats_are_accepted(
    model_of: Load, allowed: tuple[int, ...], accepted: int, adaptive: bool
) -> None:
    """The fewer tokens a random model may choose from, the more its text repeats itself."""
    options = {"logit_bias": dict.fromkeys(allowed, 100.0)}
    with Session(model_of("equal"), 256) as session:
        tokens, stats = both_ways(session, NGramProposer(), [3], 120, options, adaptive)
    assert set(tokens) == set(allowed)
    if not adaptive:  # else it depends on the clock
        assert stats.accepted >= accepted


def test_several_texts_of_one_session_share_a_proposer(model_of: Load) -> None:
    proposer = NGramProposer()
    with Session(model_of("equal"), 256) as session:
        for prompt in (REPEATING, REPEATING[::-1], REPEATING[:7], REPEATING):
            both_ways(session, proposer, prompt, 40, {}, False)


def test_where_nothing_is_proposed_a_step_is_a_single_one(model_of: Load) -> None:
    with Session(model_of("equal"), 256) as session:
        sampler = Sampler(SamplingParams(), session.model.config.vocab)
        steps = list(speculative(session, NGramProposer(), [1, 2, 3], sampler, max_tokens=4))
    assert [step.drafted for step in steps] == [0] * 4
    assert steps[-1].stats.fallback is None


PROGRAM = """class Reader:
    def read_first(self, path):
        with open(path) as file:
            return file.read()

    def read_second(self, path):
        with open(path) as file:
            return file.read()

    def read_third(self, path):
        with open(path) as file:
"""


@needs_pair
def test_the_shipped_model_accepts_repeats_of_its_prompt(shipped_pair: Pair) -> None:
    model = shipped_pair.model
    prompt = model.tokenizer.encode(PROGRAM)
    with Session(model, 1024) as session:
        _, stats = both_ways(session, NGramProposer(), prompt, 96, {}, False)
    assert stats.acceptance_length > 1.5
    assert stats.accepted_per_position[0] > stats.accepted_per_position[-1]


# --- as a draft -------------------------------------------------------------------------------------------------------


def test_it_is_loaded_by_name_and_needs_no_file(model_of: Load) -> None:
    draft = load_draft("ngram", model_of("equal"))
    assert isinstance(draft, NGramDraft)
    assert (draft.path, draft.limit, draft.taps) == ("ngram", 15, ())
    with Session(model_of("equal"), 64) as session:
        first, second = draft.open(session), draft.open(session)
        assert isinstance(first, NGramProposer)
        assert first is not second
    draft.close()


def test_an_engine_takes_it_by_name(target_path: Path, engine: Engine) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={70: 100.0, 71: 100.0})
    options = {"device": "cpu", "threads": 1, "max_context": 512, "adaptive": False, "environment": {}}
    with Engine.load(target_path, "ngram", **options) as repeating:  # type: ignore[arg-type]
        for _ in range(2):
            found, wanted = repeating.generate("one two", params), engine.generate("one two", params)
            assert (found.text, found.tokens) == (wanted.text, wanted.tokens)
            assert found.stats.accepted > 0
        assert "endings looked up" in repeating.explain()
