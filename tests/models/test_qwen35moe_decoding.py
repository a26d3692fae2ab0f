"""A `qwen35moe` model is exact after commit and restore, lossless with any draft, and runs from the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pydflash import cli
from pydflash.decode import Sampler, SamplingParams, autoregressive, collect, speculative
from pydflash.drafts import DraftSession, load_draft
from pydflash.engine import Engine
from pydflash.errors import SnapshotMismatch
from pydflash.kv_format import CACHE_TYPES
from pydflash.models import Model, load_model
from pydflash.runtime import HostProposal, Session
from pydflash.state import Snapshot
from tests.helpers import run_chunks
from tests.reference.dflash import DraftReference, speculative_reference
from tests.reference.qwen35moe import MoEReference
from tests.tiny import GEOMETRIES, MOE_GEOMETRIES, write_draft, write_target

CASES = [("moe", "q4_k_m"), ("moe", "f32"), ("moe_fused", "q8_0")]
PROMPT = np.random.default_rng(0).integers(0, 320, 21).tolist()
TOKENS = 60

ModelOf = Callable[[str, str], Model]


def draw(model: Model, count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, model.config.vocab, count).tolist()
    return tokens


# --- what a session remembers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(17))
@pytest.mark.parametrize(("name", "types"), CASES)
def test_commit_n_equals_a_fresh_run_of_those_n(model_of: ModelOf, name: str, types: str, n: int) -> None:
    model = model_of(name, types)
    prefix, block, following = draw(model, 19, 1), draw(model, 16, 2), draw(model, 5, 3)
    with Session(model, 256, "q4_0", "q8_0") as session, Session(model, 256, "q4_0", "q8_0") as fresh:
        run_chunks(session, prefix, 8)
        session.forward(block, "none")
        session.commit(n)
        run_chunks(fresh, prefix + block[:n], 1)
        rows = [run_chunks(each, following, 5) for each in (session, fresh)]
        assert np.array_equal(*rows)
        here, there = session.snapshot(), fresh.snapshot()
        assert here.arrays.keys() == there.arrays.keys()
        for name, values in there.arrays.items():
            assert np.array_equal(here.arrays[name], values), name


@pytest.mark.parametrize("n", [0, 1, 9, 16])
@pytest.mark.parametrize(("name", "types"), CASES)
def test_a_restored_session_goes_on_bit_for_bit(
    model_of: ModelOf, tmp_path: Path, name: str, types: str, n: int
) -> None:
    model = model_of(name, types)
    tokens, block, following = draw(model, 40, 1), draw(model, 16, 2), draw(model, 30, 3)
    session, restored = Session(model, 256, "q4_0", "q8_0"), Session(model, 900, "q4_0", "q8_0", chunk=64)
    with session, restored:
        session.forward(tokens, "none")
        session.commit(40)
        session.forward(block, "none")
        session.commit(n)
        restored.forward(following, "none")  # another text, pending
        session.snapshot().save(tmp_path / "snapshot")
        restored.restore(Snapshot.load(tmp_path / "snapshot"))
        assert np.array_equal(run_chunks(restored, following, 3), run_chunks(session, following, 3))


def test_a_snapshot_of_a_dense_model_is_refused_by_name(model_of: ModelOf, tmp_path: Path) -> None:
    path = write_target(tmp_path / "dense.gguf", GEOMETRIES["equal"], seed=1)
    with load_model(path, "cpu", threads=1) as dense, Session(dense, 64) as session:
        run_chunks(session, PROMPT, 8)
        snapshot = session.snapshot()
        digest = dense.digest
    with Session(model_of("moe_fused", "q8_0"), 64) as session:
        with pytest.raises(SnapshotMismatch, match=f"restore: model of the snapshot is '{digest}', that of this"):
            session.restore(snapshot)
        session.forward(PROMPT)  # it is as it was


# --- speculation ------------------------------------------------------------------------------------------------------


class Scripted:
    """A Proposer that proposes what it is told."""

    limit = 15

    def __init__(self, choose: Callable[[int, int], list[int]]) -> None:
        """``choose``: (position of the first proposed token, count) to the tokens."""
        self._choose = choose

    def propose(self, history: Sequence[int], count: int) -> HostProposal:
        return HostProposal([history[-1], *self._choose(len(history), count)])

    def commit(self, n: int) -> None:
        pass

    def sizes(self) -> dict[str, int]:
        return {}

    flush = reset = close = lambda self: None


def greedy(model: Model) -> Sampler:
    return Sampler(SamplingParams(), model.config.vocab)


def alone(model: Model, k: str, v: str) -> list[int]:
    """The autoregressive text."""
    with Session(model, 256, k, v) as session:
        return list(collect(autoregressive(session, PROMPT, greedy(model), max_tokens=TOKENS))[0])


def assert_lossless(model: Model, k: str, v: str) -> None:
    """Drafts that are right, wrong, and right up to any place of the block: the text is the autoregressive one."""
    wanted = alone(model, k, v)
    known, rng = [*PROMPT, *wanted, *[0] * 32], np.random.default_rng(4)

    def until(place: Callable[[], int]) -> Callable[[int, int], list[int]]:
        def choose(first: int, count: int) -> list[int]:
            right = place()
            return [t if i < right else (t + 1) % 320 for i, t in enumerate(known[first : first + count])]

        return choose

    for place, rate in ((lambda: 15, 1.0), (lambda: 0, 0.0), (lambda: int(rng.integers(0, 16)), None)):
        with Session(model, 256, k, v) as session:
            steps = speculative(session, Scripted(until(place)), PROMPT, greedy(model), max_tokens=TOKENS)
            tokens, stats = collect(steps)
        assert list(tokens) == wanted
        assert rate is None or stats.accepted == rate * stats.drafted
        assert stats.drafted > 0


@pytest.mark.parametrize(("name", "types"), CASES)
def test_any_draft_gives_the_autoregressive_text(model_of: ModelOf, name: str, types: str) -> None:
    assert_lossless(model_of(name, types), "f16", "f16")


@pytest.mark.parametrize("cache", list(product(CACHE_TYPES, repeat=2)), ids="/".join)
def test_any_draft_gives_the_autoregressive_text_over_every_cache(model_of: ModelOf, cache: tuple[str, str]) -> None:
    assert_lossless(model_of("moe_fused", "q8_0"), *cache)


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
@pytest.mark.parametrize("layout", ["llama.cpp", "fork"])
def test_a_random_draft_gives_the_text_and_the_accepted_lengths_of_the_oracles(
    model_of: ModelOf, tmp_path: Path, name: str, layout: str
) -> None:
    model = model_of(name, "f32")
    path = write_draft(tmp_path / "draft.gguf", MOE_GEOMETRIES[name], layers=3, window=24, layout=layout, seed=2)
    text, lengths = speculative_reference(MoEReference(model.path), DraftReference(path, model.path), PROMPT, 24, 16)
    with (
        load_draft(path, model) as draft,
        Session(model, 256, "f32", "f32", capture=draft.config.taps) as session,
        DraftSession(draft, session) as drafting,
    ):
        tokens, stats = collect(speculative(session, drafting, PROMPT, greedy(model), max_tokens=24))
    assert list(tokens) == text == alone(model, "f32", "f32")[:24]
    assert [n + 1 for n in stats.trace[:-1]] == lengths[:-1]


# --- the engine and the command line ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of a target and its draft."""
    folder, geometry = tmp_path_factory.mktemp("pair"), MOE_GEOMETRIES["moe"]
    return write_target(folder / "t.gguf", geometry, "q4_k_m"), write_draft(folder / "d.gguf", geometry, window=64)


def test_the_engine_generates_the_same_text_with_and_without_a_draft(pair: tuple[Path, Path]) -> None:
    texts = []
    for draft in (None, pair[1]):
        with Engine.load(pair[0], draft, device="cpu", threads=1, max_context=256, environment={}) as engine:
            done = engine.generate("one two three", SamplingParams(max_tokens=40, ignore_eos=True))
            assert len(done.tokens) == 40
            texts.append((done.text, done.tokens))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["info"], ("qwen35moe", "Q4_K", "parameters")),
        (["info", "--check"], ("no NaN or infinity",)),
        (["explain", "--device", "cpu"], ("weights          5,232,224 bytes", "K/V cache", "delta-net state")),
        (["generate", "--device", "cpu", "--threads", "1", "--max-tokens", "8", "--ignore-eos"], ()),
    ],
    ids=["info", "check", "explain", "generate"],
)
def test_commands_take_such_a_file(
    pair: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    prompt = ["the cat sat on"] if command[0] == "generate" else []
    with pytest.raises(SystemExit) as ended:
        cli.main([command[0], str(pair[0]), *prompt, *command[1:]])
    out = capsys.readouterr().out
    assert not ended.value.code
    assert out.strip()
    for word in words:
        assert word in out
