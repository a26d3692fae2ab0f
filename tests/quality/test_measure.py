"""Measuring changes nothing that is measured, and its numbers are those of the engine."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.kv_quality.measure import REFERENCE, AcceptancePlaces, Caches, observe
from benchmarks.kv_quality.texts import Needle, Text
from pydflash.decode import Sampler, SamplingParams, autoregressive, collect, speculative
from pydflash.drafts import DraftSession, load_draft
from pydflash.models import Model
from pydflash.runtime import Session
from tests.helpers import Pair, run_chunks
from tests.shipped import DRAFT, held_out_prompts, needs_pair

pytestmark = needs_pair


@pytest.fixture(scope="module")
def model(shipped_pair: Pair) -> Model:
    return shipped_pair.model


def greedy(model: Model) -> Sampler:
    return Sampler(SamplingParams(), model.config.vocab)


def test_logits_are_those_of_a_session_that_nobody_watches(model: Model) -> None:
    ids = model.tokenizer.encode(held_out_prompts(2)[1])[:70]
    (seen,) = observe(model, Caches("q4_0", "q8_0", "hadamard-256"), [Text(tuple(ids), ())])
    with Session(model, 256, "q4_0", "q8_0", "hadamard-256") as session:
        assert np.array_equal(seen.logits, run_chunks(session, ids, 16))
    assert seen.attention.shape == (70, model.config.heads * model.config.head_size)


def test_the_first_row_attends_to_its_own_value_whatever_the_type_of_k(model: Model) -> None:
    """A softmax over one score is 1, so the output is V as it is stored; later rows do depend on K."""
    text = Text(tuple(model.tokenizer.encode(held_out_prompts(1)[0])[:24]), ())
    caches = [Caches("f16", "f16"), Caches("q4_0", "f16"), Caches("q4_0", "f16", "hadamard-256")]
    first, *others = (next(observe(model, c, [text])).attention for c in caches)
    for other in others:
        assert np.array_equal(first[0], other[0])
        assert not np.array_equal(first[1:], other[1:])


def test_a_needle_counts_when_greedy_decoding_gives_its_answer(model: Model) -> None:
    encode = model.tokenizer.encode
    ids = encode("# remember: the code of maple is 4821\nx = 1\ny = 2\n")
    asked = encode("# recall: the code of maple is ")
    with Session(model, 256, "f16", "f16", "none") as session:
        steps = autoregressive(session, [*ids, *asked], greedy(model), max_tokens=4)
        said = [token for step in steps for token in step.tokens]
    assert model.tokenizer.decode(said) == "4821"
    wrong = [*said[:3], said[3] ^ 1]
    needles = tuple(Needle(0.0, (*asked, *answer[:-1]), tuple(answer)) for answer in (said, wrong, said))
    (seen,) = observe(model, REFERENCE, [Text(tuple(ids), needles)])
    assert seen.recalled == (True, False, True)  # the third is asked as if the second had not been


def test_acceptance_at_the_first_place_is_that_of_the_first_speculative_step(model: Model) -> None:
    prompts = [model.tokenizer.encode(text) for text in held_out_prompts(3)]
    with load_draft(DRAFT, model) as draft:
        wanted = []
        for prompt in prompts:
            with Session(model, 512, capture=draft.config.taps) as session, DraftSession(draft, session) as proposer:
                _, stats = collect(speculative(session, proposer, prompt, greedy(model), max_tokens=40))
            wanted.append(1 + stats.trace[0])
        assert AcceptancePlaces(model, draft, prompts, 16).measure(REFERENCE) == np.mean(wanted)
        assert len(set(wanted)) > 1
