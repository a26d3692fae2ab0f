"""A `qwen35moe` model is exact after commit and restore, lossless with any draft, and runs from the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pydflash import cli
from pydflash.decode import Sampler, SamplingParams, autoregressive, collect, speculative
from pydflash.drafts import load_draft
from pydflash.engine import Engine
from pydflash.errors import SnapshotMismatch
from pydflash.kv_format import CACHE_TYPES
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from pydflash.state import Snapshot
from tests.decode.test_loops import Choose, Scripted
from tests.helpers import Pair, run_chunks
from tests.reference.dflash import DraftReference, speculative_reference
from tests.reference.qwen35moe import MoEReference
from tests.tiny import GEOMETRIES, MOE_GEOMETRIES, write_draft, write_target

CASES = [("moe", "q4_k_m"), ("moe", "f32"), ("moe_fused", "q8_0")]
PROMPT = np.random.default_rng(0).integers(0, 320, 21).tolist()
TOKENS = 60

Load = Callable[[str, str], Model]
Target = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def load(device: str, target_of: Target) -> Iterator[Load]:
    """(geometry name, weight types) to a model on each device, the same for equal arguments."""
    with ExitStack() as undo:

        @cache
        def model(name: str, types: str) -> Model:
            return undo.enter_context(load_model(target_of(name, types), device, threads=1))

        yield model


def draw(model: Model, count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, model.config.vocab, count).tolist()
    return tokens


# --- what a session remembers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(17))
@pytest.mark.parametrize(("name", "types"), CASES)
def test_commit_n_equals_a_fresh_run_of_those_n(load: Load, name: str, types: str, n: int) -> None:
    model = load(name, types)
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
def test_a_restored_session_goes_on_bit_for_bit(load: Load, tmp_path: Path, name: str, types: str, n: int) -> None:
    model = load(name, types)
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


def test_a_snapshot_of_a_dense_model_is_refused_by_name(load: Load, tmp_path: Path) -> None:
    path = write_target(tmp_path / "dense.gguf", GEOMETRIES["equal"], seed=1)
    with load_model(path, "cpu", threads=1) as dense, Session(dense, 64) as session:
        run_chunks(session, PROMPT, 8)
        snapshot = session.snapshot()
        digest = dense.digest
    with Session(load("moe_fused", "q8_0"), 64) as session:
        with pytest.raises(SnapshotMismatch, match=f"restore: model of the snapshot is '{digest}', that of this"):
            session.restore(snapshot)
        session.forward(PROMPT)  # it is as it was


# --- speculation ------------------------------------------------------------------------------------------------------


def greedy(model: Model) -> Sampler:
    return Sampler(SamplingParams(), model.config.vocab)


def alone(model: Model, k: str, v: str) -> list[int]:
    """The autoregressive text."""
    with Session(model, 256, k, v) as session:
        return list(collect(autoregressive(session, PROMPT, greedy(model), max_tokens=TOKENS))[0])


def proposals(text: list[int]) -> dict[str, Choose]:
    """Drafts for a target that continues the prompt with ``text[len(PROMPT):]``."""
    known, rng = text + [0] * 32, np.random.default_rng(4)

    def until(place: Callable[[], int]) -> Choose:
        def choose(first: int, count: int) -> list[int]:
            right = place()
            return [t if i < right else (t + 1) % 320 for i, t in enumerate(known[first : first + count])]

        return choose

    return {
        "right": until(lambda: 15),
        "wrong": until(lambda: 0),
        "right up to any place": until(lambda: int(rng.integers(0, 16))),
    }


def assert_lossless(model: Model, k: str, v: str) -> None:
    wanted = alone(model, k, v)
    shares = {}
    for script, choose in proposals(PROMPT + wanted).items():
        with Session(model, 256, k, v) as session:
            draft = Scripted(session, choose)
            tokens, stats = collect(speculative(session, draft, PROMPT, greedy(model), max_tokens=TOKENS))
            draft.close()
        assert list(tokens) == wanted, script
        shares[script] = stats.accepted / stats.drafted
    assert shares["right"] == 1 > shares["right up to any place"] > shares["wrong"] == 0


@pytest.mark.parametrize(("name", "types"), CASES)
def test_any_draft_gives_the_autoregressive_text(load: Load, name: str, types: str) -> None:
    assert_lossless(load(name, types), "f16", "f16")


@pytest.mark.parametrize("cache", list(product(CACHE_TYPES, repeat=2)), ids="/".join)
def test_any_draft_gives_the_autoregressive_text_over_every_cache(
    load: Load, device: str, cache: tuple[str, str]
) -> None:
    if device == "cuda" and "f32" in cache:
        pytest.skip("attention on CUDA reads no f32 cache")
    assert_lossless(load("moe_fused", "q8_0"), *cache)


@pytest.mark.parametrize(("name", "types"), CASES)
def test_a_random_draft_gives_the_autoregressive_text(load: Load, tmp_path: Path, name: str, types: str) -> None:
    model, path = load(name, types), write_draft(tmp_path / "draft.gguf", MOE_GEOMETRIES[name], window=24, seed=2)
    with load_draft(path, model) as draft:
        session, drafting = Pair(model, draft, model.path, path).open(256, "q4_0", "q8_0")
        with session, drafting:
            tokens = collect(speculative(session, drafting, PROMPT, greedy(model), max_tokens=TOKENS))[0]
    assert list(tokens) == alone(model, "q4_0", "q8_0")


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
@pytest.mark.parametrize("layout", ["llama.cpp", "fork"])
def test_a_random_draft_gives_the_text_and_the_accepted_lengths_of_the_oracles(
    model_of: Load, tmp_path: Path, name: str, layout: str
) -> None:
    model = model_of(name, "f32")
    path = write_draft(tmp_path / "draft.gguf", MOE_GEOMETRIES[name], layers=3, window=24, layout=layout, seed=2)
    text, lengths = speculative_reference(MoEReference(model.path), DraftReference(path, model.path), PROMPT, 24, 16)
    with load_draft(path, model) as draft:
        session, drafting = Pair(model, draft, model.path, path).open()
        with session, drafting:
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
