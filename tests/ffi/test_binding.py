"""The binding turns native failures into errors, frees what it owns once, and says what was built."""

from __future__ import annotations

import pytest

from pydflash._ffi import build_info, check, ffi, last_log_line, lib
from pydflash.errors import NativeError
from pydflash.ggml_types import GGMLType


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
    assert {"cuda", "why", "ggml"} <= set(info)
    assert info["cuda"] in ("ON", "OFF")
    assert info["why"]


def test_our_type_numbers_and_sizes_are_those_of_ggml() -> None:
    for dtype in GGMLType:
        assert lib.ggml_blck_size(int(dtype)) == dtype.block_size
        assert lib.ggml_type_size(int(dtype)) == dtype.type_size
