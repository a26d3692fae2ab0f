"""`import pydflash` is fast, loads no native code, and offers what its stub lists: each name once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pydflash
from pydflash import errors

STUB = Path(pydflash.__file__).with_suffix(".pyi")
IMPORT_SECONDS = 0.3


def listed() -> list[tuple[str, str]]:
    """(name, where the stub imports it from), in its order."""
    nodes = [node for node in ast.parse(STUB.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return [(alias.name, str(node.module)) for node in nodes for alias in node.names]


def test_importing_the_package_is_fast_and_loads_no_native_code() -> None:
    program = (
        "import sys, time; begin = time.perf_counter(); import pydflash; seconds = time.perf_counter() - begin;"
        "print(seconds, 'numpy' in sys.modules, 'pydflash._ffi' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()]
    runs += [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()]
    assert all(run[1:] == ["False", "False"] for run in runs)
    assert min(float(run[0]) for run in runs) <= IMPORT_SECONDS


def test_the_stub_names_each_public_name_once() -> None:
    names = [name for name, _ in listed()]
    assert sorted(names) == sorted(set(names)) == sorted(pydflash.__all__)


def test_a_public_name_is_one_that_its_folder_offers() -> None:
    for name, source in listed():
        module = __import__(f"pydflash.{source}", fromlist=[name])
        assert name in module.__all__, f"pydflash.{source} does not offer {name}"
        assert getattr(pydflash, name) is getattr(module, name)


def test_every_error_is_public() -> None:
    assert {name for name, source in listed() if source == "errors"} == set(errors.__all__)


def test_another_name_is_no_attribute() -> None:
    assert set(pydflash.__all__) <= set(dir(pydflash))
    with pytest.raises(AttributeError, match="nothing"):
        pydflash.nothing  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert pydflash.__version__.count(".") == 2
