"""Where is the test of a module? In the folder of tests that has its folder's name, and under its own name or here."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, TESTS = ROOT / "pydflash", ROOT / "tests"
OTHER_FOLDERS = {"data", "ffi", "fuzz", "parity", "quality", "reference", "repo"}
"""Folders of tests that are not about one folder of the package."""

# Modules that are tested together with others, and where.
TESTED_IN = {
    "arguments": "fuzz/test_arguments.py",
    "doctor": "cli/test_cli.py",
    "errors": "test_control_chars.py",
    "ggml_types": "ffi/test_binding.py",
    "limits": "ffi/test_binding.py",
    "sampling_params": "test_config.py",
    "settings": "test_config.py",
    "drafts/base": "decode/test_loops.py",
    "drafts/windows": "drafts/test_dflash.py",
    "engine/completion": "engine/test_engine.py",
    "engine/explain": "engine/test_engine.py",
    "files/gguf_format": "files/test_gguf.py",
    "files/gguf_writer": "files/test_convert.py",
    "measure/ab_plot": "measure/test_ab.py",
    "models/base": "models/test_loading.py",
    "models/keys": "models/test_accounting.py",
    "models/layers": "models/test_hybrid.py",
    "models/qwen35": "models/test_hybrid.py",
    "native/traits": "native/test_backend.py",
    "ops/node": "ops/test_rows.py",
    "ops/norms": "ops/test_rows.py",
    "runtime/features": "runtime/test_pool.py",
    "runtime/output": "runtime/test_session.py",
    "runtime/proposal": "runtime/test_session.py",
    "runtime/shared": "runtime/test_pool.py",
    "runtime/tokens": "runtime/test_session.py",
    "state/layer": "state/test_sequence.py",
    "text/template_child": "text/test_template_process.py",
    "text/template_protocol": "text/test_template_process.py",
}
COMMANDS = "cli/test_cli.py"


def modules() -> list[str]:
    """``folder/module`` of each module but the binding; a folder's __init__ holds imports only."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")))
    return [path.as_posix() for path in paths if path.name != "__init__" and path.parts[0] != "_ffi"]


@pytest.mark.parametrize("module", modules())
def test_a_module_has_its_test(module: str) -> None:
    folder, _, name = module.rpartition("/")
    own = TESTS / folder / f"test_{name}.py"
    elsewhere = TESTED_IN.get(module, COMMANDS if folder == "cli" else "nowhere")
    assert own.is_file() or (TESTS / elsewhere).is_file(), f"where is the test of pydflash/{module}.py?"


def test_tests_lie_in_folders_of_the_package_s_names() -> None:
    package = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"_ffi"}
    tests = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert tests == package | OTHER_FOLDERS


def test_no_two_tests_of_a_name_need_to_be_told_apart() -> None:
    """But for those of a module's name: drafts/dflash.py, models/dflash.py and the comparison with llama.cpp's."""
    names = [path.name for path in sorted(TESTS.rglob("test_*.py"))]
    repeated = {name for name in names if names.count(name) > 1}
    modules_of = {f"test_{path.stem}.py" for path in PACKAGE.rglob("*.py")}
    assert repeated <= modules_of
