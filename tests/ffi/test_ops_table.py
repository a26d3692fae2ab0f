"""ggml_ext/ops.def is the only list of our operations: what else belongs to one stands where its row says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pydflash import ops
from pydflash._ffi import lib

ROOT = Path(__file__).parents[2]
EXT = ROOT / "ggml_ext"
ROWS = re.findall(r"^OP\((\w+), *(\w+), *(\w+), *(\w+)\)", (EXT / "ops.def").read_text(), re.MULTILINE)
NAMES = [name for _, name, _, _ in ROWS]


def _source(name: str) -> Path:
    (path,) = EXT.glob(f"*/{name}")
    return path


def test_the_table_has_rows_and_none_twice() -> None:
    assert len(ROWS) >= 11
    assert len(set(NAMES)) == len(ROWS)


@pytest.mark.parametrize(("id_", "name", "devices", "scratch"), ROWS, ids=NAMES)
def test_a_row_has_its_files(id_: str, name: str, devices: str, scratch: str) -> None:
    assert id_ == name.upper()
    assert devices in ("CUDA", "CPU_ONLY")
    assert _source(f"{name}.h").read_text().startswith(f"// {name}: "), "a contract opens with the operation's name"
    reference = _source(f"{name}.c").read_text()
    assert f"void pydflash_{name}_cpu(" in reference
    assert scratch in ("SCRATCH", "NO_SCRATCH")
    assert (f"size_t pydflash_{name}_scratch(" in reference) == (scratch == "SCRATCH")
    assert ("pydflash_node_scratch(" in reference) == (scratch == "SCRATCH")
    kernels = list(EXT.glob(f"*/{name}.cu"))
    assert len(kernels) == (devices == "CUDA")
    assert all(f"const pydflash_cuda_op pydflash_cuda_{name} = " in kernel.read_text() for kernel in kernels)


def test_the_folders_are_the_modules_of_ops() -> None:
    modules = {path.stem for path in (ROOT / "pydflash" / "ops").glob("*.py")} - {"__init__", "node", "rows"}
    assert {path.name for path in EXT.iterdir() if path.is_dir()} == modules


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_its_function_and_its_row_in_the_docs(name: str) -> None:
    assert name in ops.__all__
    assert callable(getattr(ops, name))
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "kernels.md").read_text(), re.MULTILINE)
    assert documented.count(name) == 1


def test_the_binding_knows_each_row_by_a_number_of_its_own() -> None:
    numbers = [getattr(lib, f"PYDFLASH_OP_{id_}") for id_, _, _, _ in ROWS]
    assert sorted(numbers) == list(range(len(ROWS)))


def test_the_docs_describe_no_operation_that_the_table_lacks() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "kernels.md").read_text(), re.MULTILINE)
    assert set(documented) == set(NAMES)


def test_every_declaration_of_the_binding_is_used() -> None:
    declared = re.findall(r"\b((?:ggml|pydflash)_\w+)\(", (ROOT / "pydflash/_ffi/ggml.cdef.h").read_text())
    code = "".join(p.read_text() for folder in ("pydflash", "tests") for p in sorted((ROOT / folder).rglob("*.py")))
    used = set(re.findall(r"\blib\.(\w+)", code))
    assert [name for name in declared if name not in used] == []
