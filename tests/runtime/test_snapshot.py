"""A restored session goes on bit for bit as the one that the snapshot was taken of, or the snapshot is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pydflash import Snapshot
from pydflash.errors import ContextFull, SessionClosed, ShapeError, SnapshotMismatch, StateError
from pydflash.models import Model, load_model
from pydflash.ops import Rope
from pydflash.runtime import Session
from pydflash.state import DeltaSpec, Fingerprint, KVSpec, RingSpec, host_arrays
from tests.helpers import run_chunks, state_of
from tests.tiny import GEOMETRIES, write_target

Load = Callable[..., Model]

# Geometry, weights, options: float and quantised caches, rotated by either kind of basis, layers of one kind only.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "f16-f16": ("ratio3", "f32", {"cache_k": "f16", "cache_v": "f16"}),
    "q4_0-q8_0, rotated": ("odd", "q8_0", {"cache_k": "q4_0", "cache_v": "q8_0"}),
    "q4_0-q4_0, plain": ("equal", "f32", {"cache_k": "q4_0", "cache_v": "q4_0", "k_rotation": "none"}),
    "q8_0-bf16, signed": ("gqa6", "q4_k_m", {"cache_k": "q8_0", "cache_v": "bf16", "k_rotation": "signed-128"}),
    "f32-q4_0, both rotated": (
        "gqa6",
        "q8_0",
        {"cache_k": "f32", "cache_v": "q4_0", "k_rotation": "hadamard-256", "v_rotation": "hadamard-64"},
    ),
    "all recurrent": ("all_recurrent", "f32", {}),
    "all attention": ("all_attention", "f32", {"cache_k": "q8_0", "cache_v": "q4_0"}),
}
PREFIX, FOLLOWING = 19, 20


def draw(model: Model, count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, model.config.vocab, count).tolist()
    return tokens


def go_on(session: Session, count: int = FOLLOWING + 1) -> npt.NDArray[np.float32]:
    """(count, vocab) logits of greedy decoding after token 3."""
    rows, token = [], 3
    for _ in range(count):
        rows.append(session.forward([token]).logits[0].copy())
        session.commit(1)
        token = int(rows[-1].argmax())
    return np.stack(rows)


def partly_committed(session: Session, n: int) -> None:
    """A prefix, then 16 rows of which the first n are kept: n rows to replay."""
    run_chunks(session, draw(session.model, PREFIX, 1), 8)
    session.forward(draw(session.model, 16, 2), "none")
    session.commit(n)


def prefilled(session: Session, count: int) -> None:
    session.forward(draw(session.model, count, 5), "none")
    session.commit(count)


def used(session: Session) -> None:
    """Another text, the last rows of it pending."""
    prefilled(session, 50)
    session.forward([1, 2, 3])


def prefilled_and_continued(session: Session) -> None:
    prefilled(session, 75)
    partly_committed(session, 5)


HISTORIES: dict[str, Callable[[Session], None]] = {
    "length 0": lambda session: None,
    "length 1": lambda session: prefilled(session, 1),
    "5 at once": lambda session: prefilled(session, 5),
    "several chunks": lambda session: prefilled(session, 75),
    "several chunks, then a part": prefilled_and_continued,
}


def assert_goes_on(session: Session, restored: Session) -> None:
    here, there = state_of(restored, session.model), state_of(session, session.model)
    assert restored.length == session.length
    assert here.keys() == there.keys()
    for name, values in there.items():
        assert np.array_equal(here[name], values), name
    assert np.array_equal(go_on(restored), go_on(session))


@pytest.mark.parametrize("n", range(17))
@pytest.mark.parametrize("case", CASES)
def test_a_session_restored_after_a_partial_commit_goes_on_bit_for_bit(model_of: Load, case: str, n: int) -> None:
    name, types, options = CASES[case]
    model = model_of(name, types)
    with Session(model, 256, **options) as session, Session(model, 256, **options) as restored:
        partly_committed(session, n)
        snapshot = session.snapshot()
        assert (snapshot.length, snapshot.replay) == (PREFIX + n, n)
        restored.restore(snapshot)
        assert_goes_on(session, restored)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("case", CASES)
def test_a_session_of_other_sizes_and_with_another_text_goes_on_bit_for_bit(
    model_of: Load, case: str, history: str
) -> None:
    name, types, options = CASES[case]
    model = model_of(name, types)
    other = {"max_context": 700, "chunk": 64, "capture": (0, 1)}
    with Session(model, 256, chunk=32, **options) as session, Session(model, **other, **options) as restored:
        HISTORIES[history](session)
        used(restored)
        restored.restore(session.snapshot())
        assert_goes_on(session, restored)


def test_prefill_after_a_restore_has_the_same_bits(model_of: Load) -> None:
    model = model_of("ratio3")
    with Session(model, 256) as session, Session(model, 256) as restored:
        partly_committed(session, 7)
        restored.restore(session.snapshot())
        for each in (session, restored):
            each.forward(draw(model, 60, 9), "none")
            each.commit(60)
        assert np.array_equal(go_on(restored), go_on(session))


def test_one_session_goes_back_as_often_as_it_likes(model_of: Load) -> None:
    with Session(model_of("ratio3"), 256, "q4_0", "q8_0") as session:
        partly_committed(session, 4)
        snapshot = session.snapshot()
        wanted = go_on(session)
        session.restore(snapshot)
        assert np.array_equal(go_on(session), wanted)
        session.reset()
        session.restore(snapshot)
        assert np.array_equal(go_on(session), wanted)
        session.forward([1, 2])  # pending rows are forgotten as well
        session.restore(snapshot)
        assert session.pending == 0
        assert np.array_equal(go_on(session), wanted)


def test_a_snapshot_does_not_change_when_the_session_goes_on(model_of: Load) -> None:
    with Session(model_of("ratio3"), 256) as session:
        partly_committed(session, 4)
        snapshot = session.snapshot()
        before = {name: values.copy() for name, values in snapshot.arrays.items()}
        go_on(session)
        session.reset()
    for name, values in snapshot.arrays.items():
        assert np.array_equal(values, before[name]), name
        with pytest.raises(ValueError, match="read-only"):
            values[...] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.length = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        snapshot.arrays["k.3"] = values  # type: ignore[index]


PROGRAM = """
import hashlib, sys
from pydflash import Session, Snapshot, load_model
from tests.runtime.test_snapshot import go_on
with load_model(sys.argv[1], "cpu", threads=1) as model, Session(model, 512, "q4_0", "q8_0") as session:
    session.restore(Snapshot.load(sys.argv[2]))
    print(hashlib.sha256(go_on(session).tobytes()).hexdigest())
"""


def test_a_new_process_goes_on_bit_for_bit(model_of: Load, tmp_path: Path) -> None:
    model = model_of("ratio3", "q8_0")
    with Session(model, 256, "q4_0", "q8_0") as session:
        partly_committed(session, 6)
        session.snapshot().save(tmp_path / "prefix.snapshot")
        command = [sys.executable, "-c", PROGRAM, str(model.path), str(tmp_path / "prefix.snapshot")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == hashlib.sha256(go_on(session).tobytes()).hexdigest()


def test_a_snapshot_holds_the_committed_rows_and_no_more(model_of: Load) -> None:
    model = model_of("ratio3")
    c = model.config
    with Session(model, 4096, "q4_0", "q8_0") as session:
        partly_committed(session, 4)
        snapshot = session.snapshot()
    rows = (PREFIX + 4) * c.kv_heads * c.head_size // 32 * (18 + 34) * len(c.attention_layers)
    columns = (2 * c.k_heads + c.v_heads) * c.state_size + 2 * c.v_heads
    state = c.v_heads * (c.state_size + 1) * c.state_size + (c.conv_kernel - 1 + 4) * columns
    assert snapshot.nbytes == rows + 4 * state * len(c.delta_layers)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_pending_rows_are_refused(model_of: Load) -> None:
    with Session(model_of("equal"), 64) as session:
        session.forward([1, 2, 3])
        with pytest.raises(StateError, match=r"snapshot: 3 positions are pending; commit\(n\) or commit\(0\)"):
            session.snapshot()
        session.commit(2)
        assert session.snapshot().length == 2


def test_a_closed_session_says_so(model_of: Load) -> None:
    session = Session(model_of("equal"), 64)
    snapshot = session.snapshot()
    session.close()
    for call in (session.snapshot, lambda: session.restore(snapshot)):
        with pytest.raises(SessionClosed):
            call()


def test_a_context_that_is_too_small_says_what_would_do(model_of: Load) -> None:
    model = model_of("equal")
    with Session(model, 64) as session, Session(model, 39) as small, Session(model, 40) as enough:
        prefilled(session, 40)
        prefilled(small, 9)
        untouched = state_of(small, model)
        with pytest.raises(ContextFull, match=r"holds 40 positions and this session 39 at most; .* max_context >= 40"):
            small.restore(session.snapshot())
        assert small.length == 9
        for name, values in state_of(small, model).items():
            assert np.array_equal(values, untouched[name]), name
        enough.restore(session.snapshot())
        with pytest.raises(ContextFull):
            enough.forward([1])


def other_value(value: Any) -> Any:
    """A value of the same type with which a layout can be made."""
    if isinstance(value, tuple):
        return (*value, 77)
    if isinstance(value, Rope):
        return dataclasses.replace(value, factor=value.factor * 2)
    return {"f16": "q8_0", "q4_0": "f16"}.get(value, "other") if isinstance(value, str) else value * 2


def refuses(session: Session, theirs: Fingerprint, words: str) -> None:
    """A snapshot of ``theirs`` is refused with ``words``, and the session goes on as one that never saw it."""
    foreign = Snapshot(theirs, "elsewhere", 10, 2, host_arrays(theirs.layout(10, 2)))
    session.reset()
    with Session(session.model, 256, "q4_0", "f16") as undisturbed:
        for each in (session, undisturbed):
            partly_committed(each, 3)
        with pytest.raises(SnapshotMismatch) as caught:
            session.restore(foreign)
        assert str(caught.value).startswith(words)
        assert_goes_on(undisturbed, session)


def differs(field: str, theirs: Any, ours: Any) -> str:
    return f"restore: {field} of the snapshot is {theirs!r}, that of this session is {ours!r}; open the session as"


@pytest.mark.parametrize("field", ["format", "model", "taps"])
def test_every_field_of_the_fingerprint_decides(model_of: Load, field: str) -> None:
    assert {f.name for f in dataclasses.fields(Fingerprint)} == {"format", "model", "draft", "taps", "layers"}
    with Session(model_of("equal"), 256, "q4_0", "f16") as session:
        ours = getattr(session.fingerprint, field)
        theirs = other_value(ours)
        refuses(session, dataclasses.replace(session.fingerprint, **{field: theirs}), differs(field, theirs, ours))


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, f.name) for kind in (KVSpec, DeltaSpec) for f in dataclasses.fields(kind)]
)
def test_every_field_of_a_layer_decides(model_of: Load, kind: type, field: str) -> None:
    with Session(model_of("equal"), 256, "q4_0", "f16") as session:
        layers = list(session.fingerprint.layers)
        last = max(i for i, layer in enumerate(layers) if isinstance(layer, kind))
        ours = getattr(layers[last], field)
        theirs = other_value(ours)
        layers[last] = dataclasses.replace(layers[last], **{field: theirs})  # type: ignore[type-var]
        refuses(session, dataclasses.replace(session.fingerprint, layers=tuple(layers)), differs(field, theirs, ours))


def test_the_kind_and_the_number_of_layers_decide(model_of: Load) -> None:
    with Session(model_of("equal"), 256, "q4_0", "f16") as session:
        ours = session.fingerprint
        assert [type(layer) for layer in ours.layers] == [DeltaSpec, DeltaSpec, DeltaSpec, KVSpec]
        for layers in (ours.layers[:-1], (*ours.layers, ours.layers[-1]), ours.layers[::-1], ()):
            refuses(session, dataclasses.replace(ours, layers=layers), "restore: the kind of each layer of the snapsh")


def test_the_snapshot_of_a_draft_session_is_no_session_s(model_of: Load) -> None:
    with Session(model_of("equal"), 256) as session:
        layers = (RingSpec(0, False, Rope(64, 1e7), 2, 64),)
        theirs = dataclasses.replace(session.fingerprint, draft="digest", layers=layers)
        with pytest.raises(SnapshotMismatch, match="the snapshot is that of a draft session, this is a session"):
            session.restore(Snapshot(theirs, "elsewhere", 10, 0, host_arrays(theirs.layout(10, 0))))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cache_k": "q8_0"}, "cache_k"),
        ({"cache_v": "q4_0"}, "cache_v"),
        ({"k_rotation": "none"}, "k_basis"),
        ({"v_rotation": "hadamard-64"}, "v_basis"),
    ],
    ids=str,
)
def test_a_session_opened_otherwise_refuses(
    model_of: Load, options: dict[str, Any], field: str, tmp_path: Path
) -> None:
    """Also what comes from a file, whose fingerprint is that of the session that wrote it."""
    model = model_of("ratio3")
    usual = {"cache_k": "q4_0", "cache_v": "q8_0"}
    with Session(model, 64, **usual) as session, Session(model, 64, **(usual | options)) as other:
        prefilled(session, 5)
        session.snapshot().save(tmp_path / "file")
        for snapshot in (session.snapshot(), Snapshot.load(tmp_path / "file")):
            with pytest.raises(SnapshotMismatch, match=f"restore: {field} of the snapshot is"):
                other.restore(snapshot)
        assert other.length == 0
        assert np.isfinite(go_on(other)).all()


def test_a_model_of_the_same_shape_with_other_weights_refuses(model_of: Load, tmp_path: Path) -> None:
    with Session(model_of("equal"), 64) as session:
        snapshot = session.snapshot()
    path = write_target(tmp_path / "other.gguf", GEOMETRIES["equal"], seed=2)
    with load_model(path, "cpu", threads=1) as model, Session(model, 64) as session:
        with pytest.raises(SnapshotMismatch, match=r"restore: model of the snapshot is '[0-9a-f]{64}', that of"):
            session.restore(snapshot)
        session.forward([1])


def test_arrays_that_do_not_fit_the_fingerprint_make_no_snapshot(model_of: Load) -> None:
    with Session(model_of("equal"), 64) as session:
        prefilled(session, 5)
        good = session.snapshot()
    for name, values in good.arrays.items():
        for bad in (values[:-1], values.astype(np.float64), values[..., ::-1]):
            with pytest.raises(ShapeError, match=f"{name} of shape"):
                dataclasses.replace(good, arrays={**good.arrays, name: bad})
    with pytest.raises(ShapeError, match=r"it needs state\.0"):
        dataclasses.replace(good, arrays={})


@pytest.mark.parametrize(("length", "replay"), [(40, 17), (3, 4), (-1, 0), (3, -1), ((1 << 24) + 1, 0)])
def test_counts_that_no_session_can_have_make_no_snapshot(model_of: Load, length: int, replay: int) -> None:
    """A window of more rows than the tape has would be written beyond it."""
    with Session(model_of("all_recurrent"), 64) as session:
        fingerprint = session.fingerprint
    with pytest.raises(ShapeError, match=f"a snapshot of {length} positions with {replay} rows to replay"):
        Snapshot(fingerprint, "", length, replay, host_arrays(fingerprint.layout(length, max(0, replay))))
