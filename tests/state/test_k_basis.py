"""Which basis a K cache is stored in is one rule, and no basis changes what exact attention computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pydflash.errors import ConfigError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import K_BASES, k_basis
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from pydflash.state.kv import rotation_signs
from tests.helpers import nmse, run_chunks
from tests.tiny import GEOMETRIES, write_target

Load = Callable[..., Model]

Q4, Q8, F16, F32 = GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.F16, GGMLType.F32

# K type, head size, requested, basis
TABLE = [
    (Q4, 256, "auto", "hadamard-256"),
    (Q4, 128, "auto", "hadamard-128"),
    (Q4, 64, "auto", "hadamard-64"),
    (Q4, 96, "auto", "none"),  # none of 256, 128 and 64 divides it
    (Q4, 64, "hadamard-64", "hadamard-64"),
    (Q4, 256, "hadamard-64", "hadamard-64"),
    (Q4, 256, "signed-128", "signed-128"),
    (Q4, 256, "none", "none"),
    (Q8, 256, "auto", "hadamard-256"),
    (Q8, 256, "hadamard-256", "hadamard-256"),
    (F16, 256, "auto", "none"),
    (F16, 128, "hadamard-128", "hadamard-128"),
    (F32, 256, "auto", "none"),
]


@pytest.mark.parametrize(("k_type", "size", "requested", "basis"), TABLE)
def test_the_rule(k_type: GGMLType, size: int, requested: str, basis: str) -> None:
    assert k_basis(k_type, size, requested).name == basis


@pytest.mark.parametrize("requested", ["Hadamard-256", "wht", "", "hadamard-32"])
def test_an_unknown_basis_lists_the_valid_ones(requested: str) -> None:
    valid = "valid values are auto, none, hadamard-256, hadamard-128, hadamard-64, signed-128"
    with pytest.raises(ConfigError, match=valid):
        k_basis(Q4, 256, requested)


@pytest.mark.parametrize(("size", "requested"), [(128, "hadamard-256"), (64, "hadamard-128"), (64, "signed-128")])
def test_a_group_that_does_not_divide_the_head_lists_those_that_do(size: int, requested: str) -> None:
    with pytest.raises(ConfigError, match=f"does not divide heads of {size}; valid values are auto, none"):
        k_basis(Q4, size, requested)


def test_the_signs_are_fixed() -> None:
    signs = rotation_signs(128)
    assert signs.shape == (2, 128)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert np.array_equal(signs, rotation_signs(128))
    # A stored cache depends on them: these may never change.
    assert np.packbits(signs > 0).tobytes().hex() == "0161970591925cb56256b8cc5ed41efc9da87e65ea41d41d0ea80463636d6e1f"


@pytest.mark.parametrize("basis", [name for name in K_BASES if name != "none"])
def test_a_rotated_f32_cache_gives_the_same_logits(model_of: Load, basis: str) -> None:
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
