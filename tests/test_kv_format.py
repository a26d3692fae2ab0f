"""Which basis K and V are stored in is one rule each."""

from __future__ import annotations

from itertools import product

import pytest

from pydflash.errors import ConfigError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES, V_BASES, k_basis, v_basis

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
def test_the_rule_for_k(k_type: GGMLType, size: int, requested: str, basis: str) -> None:
    assert k_basis(k_type, size, requested).name == basis


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_auto_rotates_a_k_cache_of_blocks_and_no_other(name: str) -> None:
    blocks = CACHE_TYPES[name].block_size > 1
    assert k_basis(CACHE_TYPES[name], 256).name == ("hadamard-256" if blocks else "none")


@pytest.mark.parametrize("requested", ["Hadamard-256", "wht", "", "hadamard-32"])
def test_an_unknown_basis_of_k_lists_the_valid_ones(requested: str) -> None:
    valid = "valid values are auto, none, hadamard-256, hadamard-128, hadamard-64, signed-128"
    with pytest.raises(ConfigError, match=valid):
        k_basis(Q4, 256, requested)


@pytest.mark.parametrize(("size", "requested"), [(128, "hadamard-256"), (64, "hadamard-128"), (64, "signed-128")])
def test_a_group_of_k_that_does_not_divide_the_head_lists_those_that_do(size: int, requested: str) -> None:
    with pytest.raises(ConfigError, match=f"does not divide heads of {size}; valid values are auto, none"):
        k_basis(Q4, size, requested)


def test_v_is_not_rotated_unless_asked() -> None:
    assert v_basis(256) == V_BASES["none"]
    assert v_basis(256).group == 0


@pytest.mark.parametrize(("size", "group"), [(s, g) for s, g in product((64, 128, 256), (64, 128, 256)) if g <= s])
def test_every_group_of_v_that_divides_the_head_can_be_asked_for(size: int, group: int) -> None:
    assert v_basis(size, f"hadamard-{group}").group == group


@pytest.mark.parametrize("requested", ["auto", "signed-128", "hadamard-32", ""])
def test_an_unknown_basis_of_v_lists_the_valid_ones(requested: str) -> None:
    with pytest.raises(ConfigError, match=r"valid values are none, hadamard-256, hadamard-128, hadamard-64$"):
        v_basis(256, requested)


@pytest.mark.parametrize(
    ("size", "requested", "valid"), [(128, 256, "none, hadamard-128, hadamard-64"), (64, 128, "none, hadamard-64")]
)
def test_a_group_of_v_that_does_not_divide_the_head_lists_those_that_do(size: int, requested: int, valid: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"v_rotation 'hadamard-{requested}' does not divide heads of {size}; valid values are {valid}$",
    ):
        v_basis(size, f"hadamard-{requested}")
