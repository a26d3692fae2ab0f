"""CUDA launches the runs of nodes of a step together that ggml_ext/linear/fuse.cuh lists, as many as the model has.

A run that no longer matches, because a line of a model file moved, costs speed and changes no result: only a count
shows it. On CUDA the library counts what it launched. Elsewhere its matching is compiled for the host, with kernels
that do nothing, and reads the graphs that a CUDA device would be given.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydflash._ffi
from pydflash._ffi import ffi, lib
from pydflash.drafts import DraftSession
from pydflash.models import Model
from pydflash.native import Graph
from pydflash.native.traits import CUDA
from pydflash.runtime import Session
from tests.helpers import Pair

EXT = Path(__file__).parents[2] / "ggml_ext"
KINDS = ("rms_norm", "swiglu", "gated_norm", "sigmoid_gate", "linear")
"""In the order of ``pydflash_fused_kind``."""
GXX = shutil.which("g++") or shutil.which("c++")

Runs = dict[str, int]


def of_target(model: Model) -> Runs:
    """The runs of a step: two norms a layer and the head's; what is normalised per head has heads of 128.

    Experts read what is normalised, too, so that the norm before them stands alone; their router and the shared
    expert's products are a run of their own.
    """
    c = model.config
    norms, experts = c.state_size == 128, c.architecture == "qwen35moe"
    return {
        "rms_norm": c.layers + 1 + (0 if experts else c.layers),
        "swiglu": c.layers,
        "gated_norm": len(c.delta_layers) if norms else 0,
        "sigmoid_gate": len(c.attention_layers),
        "linear": (0 if norms else len(c.delta_layers)) + (c.layers if experts else 0),
    }


def of_block(layers: int) -> Runs:
    """The runs of a proposal: beside those of its layers, K and V of injected rows, and each layer's output product."""
    return {"rms_norm": 2 * layers + 1, "swiglu": layers, "gated_norm": 0, "sigmoid_gate": 0, "linear": 2 * layers}


def counted(read: Callable[[int], int], work: Callable[[], object]) -> Runs:
    """What ``read`` counts while ``work`` is done."""
    before = [read(kind) for kind in range(len(KINDS))]
    work()
    return {name: read(kind) - before[kind] for kind, name in enumerate(KINDS)}


def test_the_kinds_are_those_of_the_header() -> None:
    header = (EXT / "linear" / "fuse.cuh").read_text()
    names = [line.strip(" ,") for line in header.splitlines() if line.strip().startswith("PYDFLASH_FUSED_")]
    assert names == [f"PYDFLASH_FUSED_{name.upper()}" for name in KINDS] + ["PYDFLASH_FUSED_KINDS"]


# --- on CUDA ----------------------------------------------------------------------------------------------------------

CASES = pytest.mark.parametrize(
    ("name", "types"), [("gqa6", "q8_0"), ("gqa6", "q4_k_m"), ("ratio3", "q8_0"), ("equal", "f16")]
)


@pytest.mark.cuda
@CASES
def test_a_step_on_cuda_launches_every_run(pair_of: Callable[..., Pair], name: str, types: str) -> None:
    """Graphs are counted when they run first; later a captured CUDA graph may be replayed instead."""
    pair = pair_of(name, types, "cuda", layers=3, window=64)
    session, draft = pair.open(256, "f16", "f16")
    read = lib.pydflash_cuda_fused_runs
    with session, draft:
        assert counted(read, lambda: session.forward([1]).logits) == of_target(pair.model)
        session.commit(1)
        draft.commit(1)
        assert counted(read, lambda: draft.propose([2]).ids) == of_block(3)
        assert counted(read, lambda: session.forward(draft.propose([2]), "all").logits)["rms_norm"] > 0


# --- anywhere ---------------------------------------------------------------------------------------------------------

CUDA_RUNTIME = "#pragma once\n#include <stddef.h>\n#include <stdint.h>\ntypedef void * cudaStream_t;\n"
HOST = """
#include "fuse.cuh"
#include "linear.cuh"
#include "ggml-impl.h"

typedef pydflash_cuda C;
typedef const float * F;
typedef int64_t I;
bool   pydflash_linear_supports(int, I, I) { return true; }
size_t pydflash_linear_packed_size(I, I) { return 1; }
size_t pydflash_linear_scratch_size(const C *) { return 1; }
bool   pydflash_linear_pack(C *, F, I, I, I, void *) { return true; }
bool   pydflash_linear_pack_rms_norm(C *, F, I, F, float, I, I, void *) { return true; }
bool   pydflash_linear_pack_swiglu(C *, F, I, F, I, I, I, void *) { return true; }
bool   pydflash_linear_pack_gated_norm(C *, F, F, F, float, I, I, void *) { return true; }
bool   pydflash_linear_pack_sigmoid_gate(C *, F, F, I, I, int, I, I, void *) { return true; }
bool   pydflash_linear_multiply(C *, void *, I, I, const pydflash_linear_weight *, int, void *) { return true; }

static void * nothing(C *, size_t) { return nullptr; }

extern "C" void walk(ggml_cgraph * graph) {  // as ggml-cuda does
    C cuda = {};
    cuda.alloc = nothing;
    for (int i = 0; i < graph->n_nodes; i++) {
        i += pydflash_fuse(&cuda, graph, i);
    }
}
"""


@pytest.fixture(scope="module")
def matching(include_paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """fuse.cu for the host, as a library: ``walk(graph)``, ``pydflash_fused_runs(kind)``."""
    if GXX is None:
        pytest.skip("no C++ compiler (g++)")
    folder = tmp_path_factory.mktemp("fuse")
    (folder / "cuda_runtime.h").write_text(CUDA_RUNTIME)
    (folder / "host.cpp").write_text(HOST)
    libraries = Path(pydflash._ffi._ggml.__file__).parent
    command = [GXX, "-shared", "-fPIC", f"-I{folder}", *include_paths]
    command += ["-x", "c++", "-std=c++17", str(folder / "host.cpp"), str(EXT / "linear" / "fuse.cu")]
    command += [
        "-x",
        "c",
        "-std=gnu11",
        str(EXT / "node.c"),
        "-x",
        "none",
        str(libraries / "libggml-base.so"),
    ]
    done = subprocess.run([*command, "-o", str(folder / "host.so")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "host.so"))
    library.pydflash_fused_runs.restype = ctypes.c_int64
    return library


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], None]:
    """Lets sessions of a model on the CPU build the graphs of a CUDA device, and run none of them."""
    monkeypatch.setattr(Graph, "run", lambda graph, *copies: None)
    return lambda model: monkeypatch.setattr(model.backend, "traits", CUDA)


def walked(library: Any, graph: Graph) -> Runs:
    address = ctypes.c_void_p(int(ffi.cast("uintptr_t", graph.c)))
    return counted(library.pydflash_fused_runs, lambda: library.walk(address))


@CASES
def test_the_graphs_for_cuda_hold_every_run(
    pair_of: Callable[..., Pair], matching: Any, as_on_cuda: Callable[[Model], None], name: str, types: str
) -> None:
    pair = pair_of(name, types, layers=3, window=64)
    as_on_cuda(pair.model)
    session, draft = pair.open(256, "f16", "f16")
    with session, draft:
        session.forward([1])
        session.commit(1)
        draft.commit(1)
        session.forward(draft.propose([2]), "all")
        assert [walked(matching, step.graph) for step in session.shared.runner.narrow] == [of_target(pair.model)] * 2
        assert [walked(matching, block.graph) for block in draft._blocks] == [of_block(3)]


@pytest.mark.parametrize(("name", "types"), [("moe", "q4_k_m"), ("moe_fused", "f16")])
def test_the_graphs_of_a_model_with_experts_hold_every_run(
    model_of: Callable[..., Model], matching: Any, as_on_cuda: Callable[[Model], None], name: str, types: str
) -> None:
    model = model_of(name, types)
    as_on_cuda(model)
    with Session(model, 256) as session:
        session.forward([1])
        assert [walked(matching, step.graph) for step in session.shared.runner.narrow] == [of_target(model)]


def test_a_wide_step_is_not_for_these_kernels(
    model_of: Callable[..., Model], matching: Any, as_on_cuda: Callable[[Model], None]
) -> None:
    model = model_of("gqa6", "q8_0")
    as_on_cuda(model)
    with Session(model, 256) as session:
        session.forward([1] * 40)
        (wide,) = session.shared.runner.wide
        runs = walked(matching, wide.graph)
    assert runs == dict.fromkeys(KINDS, 0) | {"rms_norm": 1}  # the head's, for one row


def test_a_draft_session_is_no_less_fused_beside_a_long_text(
    pair_of: Callable[..., Pair], matching: Any, as_on_cuda: Callable[[Model], None]
) -> None:
    pair = pair_of("gqa6", "q8_0", layers=3, window=64)
    as_on_cuda(pair.model)
    session = Session(pair.model, 2048, capture=pair.draft.taps)
    with session, DraftSession(pair.draft, session) as draft:
        session.forward([1] * 500, "none")
        session.commit(500)
        draft.commit(500)
        draft.propose([2])
        assert [walked(matching, block.graph) for block in draft._blocks] == [of_block(3)]
