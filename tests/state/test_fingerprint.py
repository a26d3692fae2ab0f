"""A fingerprint says what a session's bytes mean: in JSON and back, array by array, and never half believed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pydflash import state
from pydflash.errors import ShapeError, SnapshotMismatch
from pydflash.ops import Rope
from pydflash.state import FORMAT, DeltaSpec, Fingerprint, KVSpec, LayerSpec, RingSpec, check_fingerprint
from pydflash.state.fingerprint import KINDS

DELTA = DeltaSpec(k_heads=2, v_heads=4, state_size=32, conv_kernel=4)
ATTENTION = KVSpec("q4_0", "f16", "hadamard-64", "none", Rope(16, 1e7), kv_heads=2, head_size=64)
RING = RingSpec(window=24, causal=True, rope=Rope(64, 1e6, 4.0, 3, 9, 1.25), kv_heads=1, head_size=64)
TARGET = Fingerprint(FORMAT, "a" * 64, "", (), (DELTA, DELTA, ATTENTION))
DRAFT = Fingerprint(FORMAT, "a" * 64, "b" * 64, (0, 2), (RING, dataclasses.replace(RING, window=0, causal=False)))
BOTH = pytest.mark.parametrize("fingerprint", [TARGET, DRAFT], ids=["target", "draft"])


def in_json(fingerprint: Fingerprint) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(fingerprint.as_json()))
    return found


@BOTH
def test_json_gives_back_what_it_was_given(fingerprint: Fingerprint) -> None:
    assert Fingerprint.from_json(in_json(fingerprint)) == fingerprint


@BOTH
def test_json_names_every_field_and_the_kind_of_each_layer(fingerprint: Fingerprint) -> None:
    found = fingerprint.as_json()
    assert set(found) == {f.name for f in dataclasses.fields(Fingerprint)}
    for entry, layer in zip(found["layers"], fingerprint.layers, strict=True):
        kind = KINDS[entry.pop("kind")]
        assert type(layer) is kind
        if "rope" in entry:
            entry["rope"] = Rope(**entry["rope"])
        assert kind(**entry) == layer


def test_every_kind_of_layer_has_a_name() -> None:
    declared = {kind for name, kind in vars(state).items() if name.endswith("Spec")} - {LayerSpec}
    assert {KVSpec, DeltaSpec, RingSpec} <= declared == set(KINDS.values())


def test_what_a_fingerprint_is_of_follows_from_its_draft() -> None:
    assert (TARGET.kind, DRAFT.kind) == ("session", "draft session")


def test_a_layout_goes_layer_by_layer() -> None:
    layout = TARGET.layout(10, 3)
    assert list(layout) == ["state.0", "window.0", "state.1", "window.1", "k.2", "v.2"]
    assert layout["state.0"] == ((4, 33, 32), "F32")
    assert layout["window.1"] == ((3 + 3, (2 * 2 + 4) * 32 + 2 * 4), "F32")
    assert layout["k.2"] == ((10, 2 * 64 // 32 * 18), "U8")
    assert layout["v.2"] == ((10, 2 * 64 * 2), "U8")
    assert DRAFT.layout(100, 0) == {
        "k.0": ((24, 128), "U8"), "v.0": ((24, 128), "U8"), "k.1": ((100, 128), "U8"), "v.1": ((100, 128), "U8"),
    }  # fmt: skip
    assert DRAFT.layout(7, 0)["k.0"] == ((7, 128), "U8")


def test_a_draft_has_no_rows_to_replay() -> None:
    with pytest.raises(ShapeError, match="no rows to replay, found 2"):
        DRAFT.layout(10, 2)


@pytest.mark.parametrize("wrong", [True, None, 2.0, "2", [2], -1, 1 << 31], ids=repr)
def test_a_number_of_another_type_or_out_of_range_is_refused(wrong: Any) -> None:
    for change in (lambda j: j.update(format=wrong), lambda j: j["layers"][0].update(v_heads=wrong)):
        found = in_json(TARGET)
        change(found)
        with pytest.raises(ValueError, match=r"of type int|out of range"):
            Fingerprint.from_json(found)


def test_what_agrees_is_accepted() -> None:
    for fingerprint in (TARGET, DRAFT):
        check_fingerprint(Fingerprint.from_json(in_json(fingerprint)), fingerprint)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((DELTA, DELTA), "the kind of each layer"),
        ((DELTA, ATTENTION, DELTA), "the kind of each layer"),
        ((DELTA, dataclasses.replace(DELTA, v_heads=8), ATTENTION), "v_heads of the snapshot is 8, that .* is 4"),
        ((DELTA, DELTA, dataclasses.replace(ATTENTION, cache_v="q8_0")), "cache_v of the snapshot is 'q8_0', that"),
        (
            (DELTA, DELTA, dataclasses.replace(ATTENTION, rope=Rope(16, 1e7, 4.0))),
            r"rope of the snapshot is Rope\(dims=16, base=10000000.0, factor=4.0, .*, that .* factor=1.0, ",
        ),
    ],
)
def test_the_first_difference_is_named_with_both_values(layers: tuple[LayerSpec, ...], words: str) -> None:
    with pytest.raises(SnapshotMismatch, match=f"restore: {words}"):
        check_fingerprint(dataclasses.replace(TARGET, layers=layers), TARGET)


def test_a_fingerprint_of_the_other_kind_is_refused_as_such() -> None:
    with pytest.raises(SnapshotMismatch, match="that of a draft session, this is a session"):
        check_fingerprint(DRAFT, TARGET)
