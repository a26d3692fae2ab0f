"""V's basis is asked for by name and undone after attention; which pairs of cache types a device takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from pydflash.errors import ConfigError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES, V_BASES, v_basis
from pydflash.models import Model
from pydflash.runtime import Session
from pydflash.state import check_pair
from tests.helpers import nmse, run_chunks

Load = Callable[..., Model]


def test_v_is_not_rotated_unless_asked() -> None:
    assert v_basis(256) == V_BASES["none"]
    assert v_basis(256).group == 0


@pytest.mark.parametrize(("size", "group"), [(s, g) for s, g in product((64, 128, 256), (64, 128, 256)) if g <= s])
def test_every_group_that_divides_the_head_can_be_asked_for(size: int, group: int) -> None:
    assert v_basis(size, f"hadamard-{group}").group == group


@pytest.mark.parametrize("requested", ["auto", "signed-128", "hadamard-32", ""])
def test_an_unknown_basis_lists_the_valid_ones(requested: str) -> None:
    with pytest.raises(ConfigError, match=r"valid values are none, hadamard-256, hadamard-128, hadamard-64$"):
        v_basis(256, requested)


@pytest.mark.parametrize(
    ("size", "requested", "valid"), [(128, 256, "none, hadamard-128, hadamard-64"), (64, 128, "none, hadamard-64")]
)
def test_a_group_that_does_not_divide_the_head_lists_those_that_do(size: int, requested: int, valid: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"v_rotation 'hadamard-{requested}' does not divide heads of {size}; valid values are {valid}$",
    ):
        v_basis(size, f"hadamard-{requested}")


@pytest.mark.parametrize("basis", [name for name in V_BASES if name != "none"])
def test_a_rotated_f32_cache_gives_the_same_logits(model_of: Load, basis: str) -> None:
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
    check_pair(CACHE_TYPES[k], CACHE_TYPES[v], cuda=False)


@pytest.mark.parametrize(("k", "v"), list(product(CACHE_TYPES, CACHE_TYPES)))
def test_cuda_takes_every_pair_without_f32_and_names_those_with_it(k: str, v: str) -> None:
    if GGMLType.F32 in (CACHE_TYPES[k], CACHE_TYPES[v]):
        with pytest.raises(ConfigError, match=f"cache_k {k} with cache_v {v}: .* f16, bf16, q8_0, q4_0"):
            check_pair(CACHE_TYPES[k], CACHE_TYPES[v], cuda=True)
    else:
        check_pair(CACHE_TYPES[k], CACHE_TYPES[v], cuda=True)
