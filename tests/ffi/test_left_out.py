"""What stands in for the kernels that are not built: it compiles, and the check after linking names leftovers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GXX, NM = shutil.which("g++") or shutil.which("c++"), shutil.which("nm")
pytestmark = pytest.mark.skipif(GXX is None or NM is None, reason="no C++ compiler or no nm on this machine")


def compiled(source: Path, target: Path, *options: str) -> Path:
    command = [str(GXX), "-std=c++17", "-Wall", "-Wextra", "-Werror", *options, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.mark.parametrize("options", [(), ("-DPYDFLASH_CUDA_TURING",)], ids=["", "with Turing"])
def test_the_bodies_compile(include_paths: list[str], tmp_path: Path, options: tuple[str, ...]) -> None:
    compiled(ROOT / "vendor" / "left_out.cpp", tmp_path / "left_out.cpp.o", *include_paths, *options)


@pytest.mark.parametrize(
    ("bodies", "complaint"),
    [
        ("void left() {}", ""),
        ("void left() {} void spare() {}", "spare"),
        ("void left() {} template <int> void built() {} template void built<1>();", "built"),
        ("static int nothing; int * use() { return &nothing; }", "use"),
    ],
    ids=["fits", "nobody names it", "built as well", "another"],
)
def test_a_leftover_is_named(tmp_path: Path, bodies: str, complaint: str) -> None:
    """The linker is silent about a body that nobody names, and about two instances of one template."""
    rest = "void left(); template <int> void built() {} template void built<1>(); void kernel() { left(); }"
    for name, text in (("left_out.cpp", bodies), ("rest.cpp", rest)):
        (tmp_path / name).write_text(text)
        compiled(tmp_path / name, tmp_path / f"{name}.o")
    objects = [str(tmp_path / f"{name}.o") for name in ("rest.cpp", "left_out.cpp")]
    command = [sys.executable, str(ROOT / "vendor" / "check_left_out.py"), str(NM), *objects]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (complaint == "")
    assert complaint in done.stderr
