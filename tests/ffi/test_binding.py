"""The binding turns native failures into errors, says what was built, and has the numbers of the C sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pydflash import limits
from pydflash._ffi import build_info, check, ffi, last_log_line, lib
from pydflash.errors import NativeError
from pydflash.ggml_types import GGMLType

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("failure", [ffi.NULL, False, 1, -1])
def test_null_false_and_a_status_become_errors(failure: object) -> None:
    last_log_line()
    with pytest.raises(NativeError, match=r"^trying it failed$"):
        check(failure, "trying it")


@pytest.mark.parametrize("success", [True, 0])
def test_success_passes_through(success: object) -> None:
    assert check(success, "trying it") is success


def test_the_build_says_what_it_holds() -> None:
    info = build_info()
    assert {"cuda", "why", "kernels", "ggml"} <= set(info)
    assert info["cuda"] in ("ON", "OFF")
    assert info["why"]


def test_our_type_numbers_and_sizes_are_those_of_ggml() -> None:
    for dtype in GGMLType:
        assert lib.ggml_blck_size(int(dtype)) == dtype.block_size
        assert lib.ggml_type_size(int(dtype)) == dtype.type_size


def test_the_limits_of_contracts_are_those_of_the_header() -> None:
    header = (ROOT / "ggml_ext" / "contract.h").read_text(encoding="utf-8")
    defined = {name: int(value) for name, value in re.findall(r"^#define PYDFLASH_(\w+) +(\d+)", header, re.MULTILINE)}
    assert len(defined) >= 6
    assert {name: getattr(limits, name) for name in defined} == defined
    assert limits.TAPE_ROWS == limits.EXACT_ROWS  # a macro that names the other


def test_chunks_are_widths_beyond_the_exact_ones() -> None:
    assert sorted(set(limits.WIDTHS)) == list(limits.WIDTHS)
    assert limits.EXACT_ROWS in limits.WIDTHS
    assert limits.WIDTHS[limits.WIDTHS.index(limits.EXACT_ROWS) + 1 :] == limits.CHUNKS
