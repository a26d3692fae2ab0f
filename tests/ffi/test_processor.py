"""A build for one processor that is started on another says what is missing, before an instruction can fault."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from pydflash import doctor
from pydflash._ffi import _processor, check_instructions, missing_instructions
from pydflash.errors import NativeError

QEMU = shutil.which("qemu-x86_64")
LESSER = [str(QEMU), "-cpu", "Westmere", sys.executable]  # it has no AVX


def compiled() -> set[str]:
    asked = _processor.lib
    names = range(asked.pydflash_instructions_count())
    return {
        _processor.ffi.string(asked.pydflash_instructions_name(i)).decode()
        for i in names
        if asked.pydflash_instructions_compiled(i)
    }


def test_this_machine_has_what_it_compiled_for() -> None:
    assert missing_instructions() == []


def test_the_names_are_those_of_the_compiler() -> None:
    """Where the compiler was told to use what this processor has, most of the list is used."""
    assert _processor.lib.pydflash_instructions_count() > 0
    assert all(name.startswith("__") for name in compiled())


def test_what_is_missing_is_named_with_what_to_do() -> None:
    with pytest.raises(NativeError, match=r"this one has no avx2, avx512f; build it .*GGML_NATIVE=OFF"):
        check_instructions(["avx2", "avx512f"])


def test_nothing_missing_is_no_error() -> None:
    check_instructions([])


def test_doctor_reports_a_build_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it gets without native code: the import fails with the same error each time."""
    monkeypatch.delitem(sys.modules, "pydflash._ffi")
    monkeypatch.setattr(_processor, "lib", _Lacking())
    report = doctor.examine()
    assert any("this one has no test2" in problem for problem in report.problems)
    assert {"pydflash", "Python", "processors"} <= {what for what, _ in report.facts}
    assert "ggml" not in dict(report.facts)


class _Lacking:
    """A processor without the only instructions that were compiled for."""

    def pydflash_instructions_count(self) -> int:
        return 1

    def pydflash_instructions_name(self, _: int) -> object:
        return _processor.ffi.new("char[]", b"__TEST2__")

    def pydflash_instructions_compiled(self, _: int) -> bool:
        return True

    def pydflash_instructions_present(self, _: int) -> bool:
        return False


@pytest.fixture(scope="module")
def elsewhere() -> list[str]:
    """A command that runs Python on an emulated processor with fewer instructions than this one."""
    if QEMU is None:
        pytest.skip("qemu-x86_64 (package qemu-user) is not installed")
    if "__AVX2__" not in compiled():
        pytest.skip("this build runs on processors without AVX2")
    return LESSER


def test_import_and_doctor_on_a_lesser_processor(elsewhere: list[str]) -> None:
    tried = "try: import pydflash._ffi\nexcept pydflash.PydflashError as error: print('named:', error)"
    program = "\n".join(["import pydflash", tried, "from pydflash import cli", "cli.main(['doctor'])"])
    ran = subprocess.run([*elsewhere, "-c", program], capture_output=True, text=True, timeout=300)
    assert re.search(r"^named: .* this one has no .*avx2", ran.stdout, re.MULTILINE), ran.stderr[-500:]
    assert re.search(r"^problem: .* this one has no .*avx2", ran.stdout, re.MULTILINE)
    assert ran.returncode == 1
