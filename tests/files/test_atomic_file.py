"""A file is replaced by a complete one or not at all, never an input or what is no file, and litter goes away."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pydflash.errors import PydflashError, WriteError
from pydflash.files import check_output, replacing


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.bin"
    path.write_bytes(b"good")
    return path


def write(path: Path, content: bytes, *inputs: Path) -> None:
    with replacing(path, inputs) as file:
        file.write(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_the_old_contents_are_there_until_the_block_ends(good: Path) -> None:
    with replacing(good) as file:
        file.write(b"new")
        file.flush()
        assert good.read_bytes() == b"good"
    assert good.read_bytes() == b"new"
    assert names(good.parent) == ["good.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, WriteError])
def test_a_block_that_raises_changes_nothing(good: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with replacing(good) as file:
            file.write(b"half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert good.read_bytes() == b"good"
    assert names(good.parent) == ["good.bin"]


def test_a_disk_that_is_full_leaves_the_old_file_and_says_so(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        write(good, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value).startswith(f"{good}: cannot be written")
    assert good.read_bytes() == b"good"
    assert names(good.parent) == ["good.bin"]


def test_file_and_folder_are_synced_in_this_order(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(good, b"new")
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_permissions_stay_those_of_the_file_that_is_replaced(good: Path, mode: int) -> None:
    good.chmod(mode)
    write(good, b"new")
    assert stat.S_IMODE(good.stat().st_mode) == mode


def test_a_new_file_has_the_usual_permissions_and_a_private_one_its_owners(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    with replacing(tmp_path / "usual", private=True):
        pass
    assert stat.S_IMODE((tmp_path / "usual").stat().st_mode) == 0o600


def test_a_name_as_long_as_a_name_may_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes
    write(path, b"new")
    write(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert names(tmp_path) == [path.name]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["itself", "symlink", "hard link", "symlink of symlink", "other spelling"])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_output_that_is_an_input_is_refused_by_any_name(good: Path, link: str, swapped: bool) -> None:
    other = good.with_name("other.bin")
    if link == "itself":
        other = good
    elif link == "symlink":
        other.symlink_to(good.name)
    elif link == "hard link":
        other.hardlink_to(good)
    elif link == "symlink of symlink":
        good.with_name("middle").symlink_to(good)
        other.symlink_to(good.with_name("middle"))
    else:
        (good.parent / "folder").mkdir()
        other = good.parent / "folder" / ".." / good.name
    output, source = (good, other) if swapped else (other, good)
    before = names(good.parent)
    with pytest.raises(WriteError, match="is the input"):
        write(output, b"new", good.parent / "missing input", source)
    assert good.read_bytes() == b"good"
    assert names(good.parent) == before


def test_a_symlink_stays_and_the_file_it_points_to_is_replaced(good: Path) -> None:
    folder = good.parent / "folder"
    folder.mkdir()
    link = folder / "link"
    link.symlink_to(good)
    write(link, b"new")
    assert link.is_symlink()
    assert good.read_bytes() == b"new"
    assert names(folder) == ["link"]


def test_a_symlink_to_nothing_makes_the_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target.bin")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target.bin").read_bytes() == b"new"


@pytest.fixture
def device() -> Iterator[Path]:
    """A terminal: its folder is one where not even root makes files, so that a failing test harms nothing."""
    master, slave = os.openpty()
    yield Path(os.ttyname(slave))
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "symlink to a device", "symlink to itself"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, device: Path, kind: str) -> None:
    path = tmp_path / "path"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = device
    else:
        path.symlink_to(device if "device" in kind else path)
    before = os.lstat(path)
    with pytest.raises(WriteError) as caught:
        write(path, b"new")
    assert str(path) in str(caught.value)
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=f"there is no folder {tmp_path / 'none'}; make it first") as caught:
        check_output(tmp_path / "none" / "file")
    assert isinstance(caught.value, PydflashError)
    assert isinstance(caught.value, OSError)


# --- litter -----------------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pydflash.files import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def end(writer: subprocess.Popen[str], number: signal.Signals) -> None:
    writer.send_signal(number)
    writer.communicate()


def test_the_next_writer_removes_what_a_killed_one_left(good: Path) -> None:
    end(start_writer(good), signal.SIGKILL)
    assert len(names(good.parent)) == 2
    write(good, b"new")
    assert good.read_bytes() == b"new"
    assert names(good.parent) == ["good.bin"]


def test_the_file_of_a_live_writer_is_left_alone(good: Path) -> None:
    writer = start_writer(good)
    try:
        write(good, b"new")
        assert len(names(good.parent)) == 2
    finally:
        end(writer, signal.SIGINT)
    assert good.read_bytes() == b"new"
    assert names(good.parent) == ["good.bin"]


def test_litter_of_other_files_and_files_with_like_names_are_left_alone(good: Path) -> None:
    end(start_writer(good.with_name("good.bin2")), signal.SIGKILL)
    token = "0123456789abcdef"
    for name in (f".good.bin.{token}", f"good.bin.{token}.partial", f".good.bin.x{token}.partial", ".good.bin.partial"):
        good.with_name(name).write_text("mine")
    before = names(good.parent)
    write(good, b"new")
    assert names(good.parent) == before


def test_litter_that_is_a_link_or_a_pipe_harms_nothing(good: Path) -> None:
    victim = good.with_name("victim")
    victim.write_bytes(b"victim")
    good.with_name(".good.bin.0123456789abcdef.partial").symlink_to(victim)
    os.mkfifo(good.with_name(".good.bin.fedcba9876543210.partial"))
    write(good, b"new")
    assert victim.read_bytes() == b"victim"
    assert good.read_bytes() == b"new"


def test_many_writers_at_once_leave_one_whole_file(good: Path) -> None:
    program = """
import sys
from pydflash.files import replacing
for round in range(30):
    with replacing(sys.argv[1]) as file:
        for _ in range(10):
            file.write(sys.argv[2].encode() * 1000)
"""
    writers = [subprocess.Popen([sys.executable, "-c", program, str(good), letter]) for letter in "abc"]
    deadline = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
        content = good.read_bytes()
        assert content == b"good" or (len(content) == 10_000 and len(set(content)) == 1)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert names(good.parent) == ["good.bin"]
