"""No basis of K or V changes what exact attention computes; which pairs of cache types a device takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from pydflash.errors import ConfigError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES, K_BASES, V_BASES
from pydflash.models import Model, load_model
from pydflash.native.traits import CPU, CUDA
from pydflash.runtime import Session
from pydflash.state import check_pair
from pydflash.state.kv import rotation_signs
from tests.helpers import nmse, run_chunks
from tests.tiny import GEOMETRIES, write_target

Load = Callable[..., Model]


def test_the_signs_are_fixed() -> None:
    signs = rotation_signs(128)
    assert signs.shape == (2, 128)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert np.array_equal(signs, rotation_signs(128))
    # A stored cache depends on them: these may never change.
    assert np.packbits(signs > 0).tobytes().hex() == "0161970591925cb56256b8cc5ed41efc9da87e65ea41d41d0ea80463636d6e1f"


@pytest.mark.parametrize("basis", [name for name in K_BASES if name != "none"])
def test_an_f32_cache_with_k_rotated_gives_the_same_logits(model_of: Load, basis: str) -> None:
    """The rotation is orthonormal: scores change by float32 rounding, an NMSE of 1e-13, and more in later layers."""
    model = model_of("gqa6")
    tokens = np.random.default_rng(0).integers(0, 512, 40).tolist()
    with Session(model, 64, "f32", "f32", "none") as plain, Session(model, 64, "f32", "f32", basis) as rotated:
        wanted, got = run_chunks(plain, tokens, 8), run_chunks(rotated, tokens, 8)
        assert 0 < nmse(got, wanted) < 1e-11
        plain.reset()
        rotated.reset()
        assert nmse(rotated.forward(tokens, "all").logits, plain.forward(tokens, "all").logits) < 1e-11


@pytest.mark.parametrize("basis", ["hadamard-256", "hadamard-128", "hadamard-64", "signed-128"])
def test_rotation_saves_a_q4_0_cache_from_outlier_channels(
    tmp_path_factory: pytest.TempPathFactory, basis: str
) -> None:
    """A few large channels of K stretch the 16 levels of their blocks; spread over the group they cost little."""
    path = write_target(tmp_path_factory.mktemp("outliers") / "x.gguf", GEOMETRIES["gqa6"], seed=1, outliers=30.0)
    tokens = np.random.default_rng(0).integers(0, 512, 64).tolist()
    with load_model(path, "cpu", threads=1) as model:
        rows = {}
        for name, k in (("none", "f32"), ("none", "q4_0"), (basis, "q4_0")):
            with Session(model, 64, k, "f32", name) as session:
                rows[name, k] = run_chunks(session, tokens, 8)
    exact = rows["none", "f32"]
    assert nmse(rows[basis, "q4_0"], exact) < nmse(rows["none", "q4_0"], exact) / 2


@pytest.mark.parametrize("basis", [name for name in V_BASES if name != "none"])
def test_an_f32_cache_with_v_rotated_gives_the_same_logits(model_of: Load, basis: str) -> None:
    """Attention's output is linear in V, and the rotation is its own inverse: float32 rounding is left, 1e-13."""
    model = model_of("gqa6")
    tokens = np.random.default_rng(0).integers(0, 512, 40).tolist()
    with Session(model, 64, "f32", "f32") as plain, Session(model, 64, "f32", "f32", v_rotation=basis) as rotated:
        wanted, got = run_chunks(plain, tokens, 8), run_chunks(rotated, tokens, 8)
        assert 0 < nmse(got, wanted) < 1e-11
        plain.reset()
        rotated.reset()
        assert nmse(rotated.forward(tokens, "all").logits, plain.forward(tokens, "all").logits) < 1e-11


def test_k_and_v_rotate_independently(model_of: Load) -> None:
    model = model_of("gqa6")
    tokens = np.random.default_rng(0).integers(0, 512, 40).tolist()
    with (
        Session(model, 64, "f32", "f32") as plain,
        Session(model, 64, "f32", "f32", "signed-128", "hadamard-64") as both,
    ):
        assert 0 < nmse(run_chunks(both, tokens, 8), run_chunks(plain, tokens, 8)) < 1e-11


# --- pairs of types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "v"), list(product(CACHE_TYPES, CACHE_TYPES)))
def test_the_cpu_takes_every_pair(k: str, v: str) -> None:
    check_pair(CACHE_TYPES[k], CACHE_TYPES[v], CPU.cache_types)


@pytest.mark.parametrize(("k", "v"), list(product(CACHE_TYPES, CACHE_TYPES)))
def test_cuda_takes_every_pair_without_f32_and_names_those_with_it(k: str, v: str) -> None:
    if GGMLType.F32 in (CACHE_TYPES[k], CACHE_TYPES[v]):
        read = ", ".join(name for name in CACHE_TYPES if name != "f32")
        with pytest.raises(ConfigError, match=f"cache_k {k} with cache_v {v}: .* {read} only"):
            check_pair(CACHE_TYPES[k], CACHE_TYPES[v], CUDA.cache_types)
    else:
        check_pair(CACHE_TYPES[k], CACHE_TYPES[v], CUDA.cache_types)
