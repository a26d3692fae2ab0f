"""Imports point down: the package's folders and modules stand in one order, and no circle is in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pydflash"

# A folder, or a module beside the folders, may import those above it here, none of its own line. CONTRIBUTING.md shows
# the same order. Up to kv_format nothing needs numpy or native code.
LAYERS = (
    ("control_chars", "ggml_types", "limits", "machine"),
    ("errors",),
    ("arguments",),
    ("settings", "kv_format"),
    ("_ffi", "files", "text"),
    ("native",),
    ("ops", "doctor"),
    ("state",),
    ("models", "config", "sampling_params"),
    ("runtime",),
    ("drafts",),
    ("decode",),
    ("engine",),
    ("measure",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NATIVE = {"native", "ops", "doctor"}
"""Who may see the binding."""
ENDS = {"measure": {"measure", "cli"}, "cli": {"cli"}}
"""Folders that are for commands and benchmarks, and who may import them."""
FROM_OUTSIDE = {
    "models.dflash": "the DFlash network belongs to drafts.dflash, and what it is to no other user of models",
}
"""Modules that others import by their file and when they are imported themselves, and why."""


@dataclass(frozen=True)
class Import:
    """``module`` asks for ``name``, both below the package. ``lazy``: in a function, or for type checking only."""

    module: str
    name: str
    lazy: bool


def modules() -> Iterator[tuple[str, Path]]:
    """Name below the package and path of every module; a folder's __init__ has the folder's name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "_ffi.generate"):  # the public names are lazy; the generator is a program of the build
            yield name, path


MODULES = dict(modules())


def folder(name: str) -> str:
    return name.partition(".")[0]


def imports(module: str, path: Path) -> Iterator[Import]:
    """Every import of the package's own modules in ``path``, those in functions and for type checking included."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while pending:
        node, lazy = pending.pop()
        lazy |= isinstance(node, ast.FunctionDef)
        lazy |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        pending.extend((child, lazy) for child in ast.iter_child_nodes(node))
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = [part for part in parts if part.removeprefix("pydflash.") in MODULES]
            names = ours + ([] if len(ours) == len(parts) else [str(node.module)])
        for name in names:
            below = name.removeprefix("pydflash.")
            if name.startswith("pydflash.") and folder(below) in RANK:
                yield Import(module, below, lazy)


IMPORTS = [found for name, path in MODULES.items() for found in imports(name, path)]
FOLDERS = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def test_the_reading_of_imports_finds_what_there_is() -> None:
    found = {(i.module, i.name): i.lazy for i in IMPORTS}
    assert found["ops.linear", "native"] is False  # from a folder
    assert found["ops.linear", "_ffi"] is False
    assert found["text.template_child", "text.sandbox"] is True  # for type checking
    assert found["cli.bench", "measure.bench"] is True  # in a function
    assert found["state.kv", "ops"] is False  # from pydflash import ops
    assert found["models.loading", "models.qwen35"] is False  # from pydflash.models import qwen35


def test_every_folder_and_module_has_its_place() -> None:
    assert {folder(name) for name in MODULES} == set(RANK)


@pytest.mark.parametrize("name", RANK)
def test_imports_point_down(name: str) -> None:
    wrong = [i for i in IMPORTS if folder(i.module) == name != folder(i.name) and RANK[folder(i.name)] >= RANK[name]]
    assert wrong == [], f"{name} imports what does not stand below it"


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_modules_of_a_folder_form_no_circle(name: str) -> None:
    """Imports for type checking count: modules that name each other's types know each other."""
    inside = {m: {i.name for i in IMPORTS if i.module == m and folder(i.name) == name} for m in MODULES}
    remaining = {m: inside[m] - {m} for m in MODULES if folder(m) == name}
    while free := [m for m, asked in remaining.items() if not asked & remaining.keys()]:
        for m in free:
            del remaining[m]
    assert remaining == {}, f"these modules of {name} import each other"


def test_from_outside_one_imports_the_folder_and_not_its_files() -> None:
    inner = [i for i in IMPORTS if folder(i.module) != folder(i.name) and i.name not in RANK and not i.lazy]
    assert {i.name for i in inner} == set(FROM_OUTSIDE), inner


def test_only_a_few_see_the_binding() -> None:
    assert {folder(i.module) for i in IMPORTS if folder(i.name) == "_ffi"} - {"_ffi"} == NATIVE


@pytest.mark.parametrize("name", ENDS)
def test_commands_and_measurements_are_nobody_s_means(name: str) -> None:
    assert {folder(i.module) for i in IMPORTS if folder(i.name) == name} <= ENDS[name]


def test_contributing_shows_the_same_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = next(block for block in text.split("\n\n") if block.startswith("    ") and "<-" in block)
    floors = [{name.strip() for name in floor.split(",")} for floor in picture.replace("\n", " ").split("<-")]
    assert floors == [set(names) for names in LAYERS]


def test_the_rules_of_this_page_are_not_out_of_date() -> None:
    assert all(name in MODULES for name in FROM_OUTSIDE)
    assert all(name in RANK for name in (*NATIVE, *ENDS))
