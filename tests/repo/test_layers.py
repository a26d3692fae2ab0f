"""The repository keeps its own rules: layers, style, types, import time, and nothing private in the text."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pydflash"

# A module may import those to its left (above it here), none of its own group. CONTRIBUTING.md shows the same order.
LAYERS = (
    ("control_chars", "limits", "machine"),
    ("errors", "ggml_types"),
    ("settings", "kv_format"),
    ("config", "sampling_params"),
    ("gguf_format", "atomic_file"),
    ("gguf", "gguf_writer"),
    ("_ffi",),
    ("device_lock", "headroom"),
    ("tensor",),
    ("backend",),
    ("graph",),
    ("ops",),
    ("weights", "sampling", "tokenizer"),
    ("chat",),
    ("state",),
    ("snapshot",),
    ("models.qwen35", "models.dflash"),
    ("models",),
    ("session",),
    ("width",),
    ("draft",),
    ("decode",),
    ("convert", "doctor", "verdict", "gguf_check", "chat_input"),
    ("engine",),
    ("bench", "ab_report"),
    ("ab",),
    ("cli.show", "cli.options"),
    ("cli.engine", "cli.info", "cli.doctor", "cli.convert", "cli.bench", "cli.ab"),
    ("cli.generate", "cli.chat", "cli.demo", "cli.explain"),
    ("cli",),
)
RANK = {name: rank for rank, group in enumerate(LAYERS) for name in group}
NATIVE = {"device_lock", "headroom", "tensor", "backend", "graph", "ops", "doctor"}
IMPORT_SECONDS = 0.3


def modules() -> Iterator[tuple[str, Path]]:
    """Name below the package and path of every module, the package itself and the build's generator left out."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "_ffi.generate"):
            yield name, path


def imported(path: Path) -> set[str]:
    """Modules of the package that ``path`` imports, those for type checking only left out."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("pydflash." if node.level else "") + (node.module or "")
            whole = [f"{base}.{alias.name}".replace("..", ".") for alias in node.names]
            found |= {name if name.removeprefix("pydflash.") in RANK else base for name in whole}
    ours = {name.removeprefix("pydflash.") for name in found if name.startswith("pydflash.")} - {"_contract"}
    return {"_ffi" if name.startswith("_ffi") else name for name in ours}


def test_every_module_has_its_place() -> None:
    assert {name for name, _ in modules()} == set(RANK)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_left(name: str, path: Path) -> None:
    for other in imported(path) - {name}:
        assert RANK[other] < RANK[name], f"{name} imports {other}, which is not to its left"


def test_only_a_few_modules_touch_native_code() -> None:
    assert {name for name, path in modules() if "_ffi" in imported(path) - {name}} <= NATIVE


def test_importing_the_package_is_fast_and_loads_no_native_code() -> None:
    program = (
        "import sys, time; begin = time.perf_counter(); import pydflash; seconds = time.perf_counter() - begin;"
        "print(seconds, 'numpy' in sys.modules, 'pydflash._ffi' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()]
    runs += [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()]
    assert all(run[1:] == ["False", "False"] for run in runs)
    assert min(float(run[0]) for run in runs) <= IMPORT_SECONDS


def test_ruff_has_nothing_to_say() -> None:
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_is_strictly_typed() -> None:
    command = [sys.executable, "-m", "mypy", "--no-incremental", "pydflash"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Put together here, so that this file does not hold what it looks for.
FORBIDDEN = [
    re.compile(pattern)
    for pattern in (
        r"/wo" + r"rk/", r"/var/" + r"tmp", r"(?<![\w.])/tm" + r"p/", r"/ho" + r"me/\w", r"/ro" + r"ot/",
        r"pypi\." + r"org", r"pythonhosted\." + r"org", r"index-" + r"url", r"hugging" + r"face\.co",
        r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"[\U0001F300-\U0001FAFF]",
    )
]  # fmt: skip
TEXT = {".py", ".md", ".toml", ".cmake", ".txt", ".c", ".h", ".cu", ".cuh", ".hook", ".sh", ".yml", ""}


def tracked_text() -> Iterator[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in TEXT and path.is_file() and "data" not in path.parts[:-1]:
            yield path


def test_no_file_names_a_machine_or_a_registry_host() -> None:
    for path in tracked_text():
        text = path.read_text(encoding="utf-8")
        for pattern in FORBIDDEN:
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(ROOT)} holds {found.group()!r}"


def test_the_test_command_of_the_readme_is_what_the_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    command = next(line for line in script.splitlines() if line.startswith("python3 "))
    assert command in (ROOT / "README.md").read_text()
