"""commit(n) leaves a session where a fresh run of the n kept tokens would have: logits, K/V, delta state, window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pydflash.errors import StateError
from pydflash.models import Model
from pydflash.runtime import Session
from tests.helpers import run_chunks, state_of

Load = Callable[..., Model]

CASES = [
    ("ratio3", "f32", "f32", "f32"),
    ("ratio3", "q4_k_m", "f16", "f16"),
    ("odd", "q8_0", "q4_0", "q8_0"),
    ("all_recurrent", "f32", "f16", "f16"),
    ("all_attention", "f32", "f16", "f16"),
]
PREFIX, NEXT = 19, 5


def draw(model: Model, count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, model.config.vocab, count).tolist()
    return tokens


def assert_equal_to_a_fresh_run(session: Session, kept: list[int], k: str, v: str) -> None:
    """Forward the same next tokens here and after a run of ``kept``, one by one: everything must agree bit for bit."""
    model = session.model
    following = draw(model, NEXT, 77)
    with Session(model, session.max_context, k, v) as fresh:
        run_chunks(fresh, kept, 1)
        wanted = fresh.forward(following, "all").logits
        got = session.forward(following, "all").logits
        assert session.length == fresh.length == len(kept)
        assert np.array_equal(got, wanted)
        here, there = state_of(session, model), state_of(fresh, model)
        assert here.keys() == there.keys()
        for name, values in there.items():
            assert np.array_equal(here[name], values), name


@pytest.mark.parametrize("n", range(17))
@pytest.mark.parametrize(("name", "types", "k", "v"), CASES)
def test_commit_n_equals_a_fresh_run_of_those_n(model_of: Load, name: str, types: str, k: str, v: str, n: int) -> None:
    model = model_of(name, types)
    prefix, block = draw(model, PREFIX, 1), draw(model, 16, 2)
    with Session(model, 256, k, v) as session:
        run_chunks(session, prefix, 8)
        session.forward(block, "none")
        session.commit(n)
        assert_equal_to_a_fresh_run(session, prefix + block[:n], k, v)


@pytest.mark.parametrize(
    ("n", "m"), [(0, 0), (0, 16), (16, 0), (1, 1), (2, 3), (3, 1), (7, 16), (16, 16), (16, 1), (5, 0)]
)
@pytest.mark.parametrize(("name", "types", "k", "v"), CASES)
def test_two_commits_in_a_row_equal_a_fresh_run(
    model_of: Load, name: str, types: str, k: str, v: str, n: int, m: int
) -> None:
    model = model_of(name, types)
    first, second = draw(model, 16, 2), draw(model, 16, 3)
    with Session(model, 256, k, v) as session:
        session.forward(first, "none")
        session.commit(n)
        session.forward(second, "none")
        session.commit(m)
        assert_equal_to_a_fresh_run(session, first[:n] + second[:m], k, v)


@pytest.mark.parametrize("width", range(1, 17))
def test_any_width_can_be_kept_in_part(model_of: Load, width: int) -> None:
    model = model_of("ratio3", "f32")
    block = draw(model, width, 4)
    for n in {0, 1, width // 2, width - 1, width}:
        with Session(model, 256, "f32", "f32") as session:
            session.forward(block, "none")
            session.commit(n)
            assert_equal_to_a_fresh_run(session, block[:n], "f32", "f32")


def test_a_thousand_random_cycles_do_not_drift(model_of: Load) -> None:
    model = model_of("equal", "q8_0")
    rng = np.random.default_rng(11)
    kept: list[int] = []
    with Session(model, 8192, "q4_0", "q8_0") as session:
        for _ in range(1000):
            block = rng.integers(0, model.config.vocab, int(rng.integers(1, 17))).tolist()
            session.forward(block, "none")
            n = int(rng.integers(0, len(block) + 1)) // int(rng.integers(1, 4))
            session.commit(n)
            kept += block[:n]
        following = draw(model, NEXT, 77)
        got = session.forward(following, "all").logits
        with Session(model, 8192, "q4_0", "q8_0") as fresh:
            for start in range(0, len(kept), 16):
                piece = kept[start : start + 16]
                fresh.forward(piece, "none")
                fresh.commit(len(piece))
            assert np.array_equal(got, fresh.forward(following, "all").logits)
            there = state_of(fresh, model)
        for name, values in state_of(session, model).items():
            assert np.array_equal(values, there[name]), name
    assert len(kept) > 2000


@pytest.mark.parametrize("n", [1, 5, 16])
def test_prefill_continues_after_a_partial_commit(model_of: Load, n: int) -> None:
    model = model_of("ratio3", "f32")
    block, long = draw(model, 16, 2), draw(model, 60, 3)
    with Session(model, 256, "f32", "f32") as session, Session(model, 256, "f32", "f32") as fresh:
        session.forward(block, "none")
        session.commit(n)
        run_chunks(fresh, block[:n], 1)
        for each in (session, fresh):
            each.forward(long, "none")
            each.commit(len(long))
        assert np.array_equal(session.forward([3]).logits, fresh.forward([3]).logits)


def test_a_wide_forward_can_only_be_committed_whole(model_of: Load) -> None:
    model = model_of("equal")
    tokens = draw(model, 40, 1)
    with Session(model, 256) as session:
        wide = session.forward(tokens).logits.copy()
        for n in (0, 1, 16, 39):
            with pytest.raises(
                StateError, match=rf"commit\({n}\): a forward of 40 rows can only be committed whole; .* 16"
            ):
                session.commit(n)
        assert session.pending == 40  # the refusals changed nothing
        session.commit(40)
        assert session.length == 40
        follow = session.forward([1]).logits.copy()
        session.commit(0)
        session.reset()
        assert np.array_equal(session.forward(tokens).logits, wide)
        session.commit(40)
        assert np.array_equal(session.forward([1]).logits, follow)


def test_reset_forgets_everything(model_of: Load) -> None:
    model = model_of("ratio3")
    tokens = draw(model, 12, 5)
    with Session(model, 256) as session:
        first = session.forward(tokens, "all").logits.copy()
        session.reset()  # with rows pending
        assert (session.length, session.pending) == (0, 0)
        session.forward(draw(model, 9, 6), "none")
        session.commit(4)
        session.reset()  # with a prefix to be replayed
        assert np.array_equal(session.forward(tokens, "all").logits, first)


def test_sessions_of_one_model_do_not_touch_each_other(model_of: Load) -> None:
    model = model_of("ratio3")
    a, b = draw(model, 20, 1), draw(model, 20, 2)
    with Session(model, 256) as one, Session(model, 512, "q8_0", "q8_0") as other, Session(model, 256) as alone:
        wanted = run_chunks(alone, a, 5)
        rows = []
        for start in range(0, 20, 5):
            rows.append(one.forward(a[start : start + 5], "all").logits)
            one.commit(5)
            other.forward(b[start : start + 5], "all")
            other.commit(3)
        assert np.array_equal(np.concatenate(rows), wanted)
