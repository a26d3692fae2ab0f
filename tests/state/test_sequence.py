"""The states of all layers: memory by what it is for, tensors by the names that layouts use, cleared and freed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pydflash.errors import ConfigError, OutOfMemory
from pydflash.ggml_types import GGMLType
from pydflash.native import Backend
from pydflash.ops import Rope
from pydflash.state import DeltaSpec, DeltaState, KVCache, KVSpec, LayerState, Room, SequenceState

DELTA = DeltaSpec(k_heads=2, v_heads=4, state_size=32, conv_kernel=4)
ATTENTION = KVSpec("q8_0", "f16", "signed-128", "none", Rope(16, 1e7), kv_heads=2, head_size=128)
ROOM = Room(positions=256, fused=True)


@pytest.fixture
def state(cpu: Backend) -> Iterator[SequenceState[LayerState]]:
    state: SequenceState[LayerState] = SequenceState(cpu, (DELTA, ATTENTION, DELTA), ROOM)
    yield state
    state.close()


def contents(cpu: Backend, state: SequenceState[LayerState], name: str) -> np.ndarray:
    tensor = state.tensor(name)
    out = np.empty(tensor.nbytes, np.uint8)
    cpu.read(tensor, out)
    return out


def test_states_lie_in_the_order_of_the_layers(state: SequenceState[LayerState]) -> None:
    assert state.specs == (DELTA, ATTENTION, DELTA)
    assert [type(layer) for layer in state.layers] == [DeltaState, KVCache, DeltaState]
    of_delta, of_attention = ["state", "window"], ["k", "signs", "v"]
    assert [sorted(layer.tensors) for layer in state.layers] == [of_delta, of_attention, of_delta]


def test_a_tensor_has_the_name_of_its_part_and_layer(state: SequenceState[LayerState]) -> None:
    for name in ("state.0", "window.2", "k.1", "signs.1"):
        part, layer = name.split(".")
        assert state.tensor(name) is state.layers[int(layer)].tensors[part]
    assert (state.tensor("k.1").shape, state.tensor("k.1").dtype) == ((257, 256), GGMLType.Q8_0)
    assert (state.tensor("v.1").shape, state.tensor("v.1").dtype) == ((257, 256), GGMLType.F16)
    assert state.tensor("state.2").shape == (1, *DELTA.state_shape)
    for name in ("k.0", "state.1", "k.3", "k"):
        with pytest.raises((KeyError, IndexError, ValueError)):
            state.tensor(name)


def test_what_a_layout_names_is_the_beginning_of_a_tensor(state: SequenceState[LayerState]) -> None:
    for i, spec in enumerate(state.specs):
        for name, (shape, _) in spec.layout(100, 16).items():
            tensor = state.tensor(f"{name}.{i}")
            rows, *row = tensor.shape[1:] if name in ("state", "window") else tensor.shape  # the first has slots
            assert shape[0] <= rows
            assert np.prod(shape[1:]) in (np.prod(row), tensor.dtype.nbytes(row[0]))


def test_memory_is_told_by_what_it_is_for(state: SequenceState[LayerState]) -> None:
    sizes = state.sizes()
    least = {
        "delta-net state": 2 * state.tensor("state.0").nbytes,
        "rollback tape": 2 * state.tensor("window.0").nbytes,
        "K/V cache": sum(state.tensor(name).nbytes for name in ("k.1", "v.1", "signs.1")),
    }
    assert sizes.keys() == least.keys()
    assert all(0 <= sizes[what] - size <= 256 for what, size in least.items())  # alignment


def test_clearing_forgets_what_must_be_zero_and_leaves_what_never_changes(
    cpu: Backend, state: SequenceState[LayerState]
) -> None:
    signs = contents(cpu, state, "signs.1")
    assert signs.any()
    for name in ("state.0", "window.0", "state.2", "window.2", "k.1"):
        cpu.write(state.tensor(name), np.full(state.tensor(name).nbytes, 7, np.uint8))
    state.clear()
    for name in ("state.0", "window.0", "state.2", "window.2"):
        assert not contents(cpu, state, name).any(), name
    assert np.array_equal(contents(cpu, state, "signs.1"), signs)
    assert contents(cpu, state, "k.1").any()  # rows beyond the length are never seen


def test_closing_twice_is_harmless(cpu: Backend) -> None:
    state: SequenceState[LayerState] = SequenceState(cpu, (DELTA, ATTENTION), ROOM)
    state.close()
    state.close()


def test_a_sequence_without_layers_holds_nothing(cpu: Backend) -> None:
    state: SequenceState[LayerState] = SequenceState(cpu, (), ROOM)
    state.clear()
    assert (state.layers, state.sizes()) == ([], {})
    state.close()


def test_what_no_memory_holds_is_refused_by_what_it_is_for(cpu: Backend) -> None:
    with pytest.raises(OutOfMemory, match=r"the K/V cache, for 1,099,511,627,000 positions needs"):
        SequenceState(cpu, (DELTA, ATTENTION), Room(1_099_511_627_000, True))


def test_a_type_whose_blocks_do_not_fit_the_heads_is_refused_by_its_setting(cpu: Backend) -> None:
    spec = KVSpec("f16", "q4_0", "none", "none", Rope(16, 1e7), kv_heads=2, head_size=80)
    with pytest.raises(ConfigError, match="cache_v q4_0 packs 32 values, heads hold 80"):
        SequenceState(cpu, (DELTA, spec), ROOM)
