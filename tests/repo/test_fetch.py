"""The pinned source is compared with its hash before any of its code runs."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FETCH = Path(__file__).parents[2] / "vendor" / "fetch.py"
NAME, VERSION = "marked-package", "1.2.3"

# A build back end that needs nothing from outside, and leaves a mark when it is imported.
BACK_END = """
import os, pathlib
pathlib.Path(os.environ["MARK"]).touch()

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / "marked_package-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: marked-package\\nVersion: 1.2.3\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info.name

def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise RuntimeError("nothing is built")
"""
FILES = {
    "PKG-INFO": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "back_end"\nbackend-path = ["."]\n',
    "back_end.py": BACK_END,
    "vendor/ggml/src/ggml.c": "// the source\n",
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The source distribution in a folder of its own."""
    root = f"{NAME.replace('-', '_')}-{VERSION}"
    path = tmp_path / "index" / f"{root}.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, text in FILES.items():
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def fetch(archive: Path, sha256: str, cache: Path, mark: Path) -> subprocess.CompletedProcess[str]:
    pin = archive.parent / "pin.toml"
    lines = {"package": NAME, "version": VERSION, "sha256": sha256, "folder": "vendor/ggml"}
    pin.write_text("".join(f'{key} = "{value}"\n' for key, value in lines.items()))
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(archive.parent), "MARK": str(mark)}
    command = [sys.executable, str(FETCH), str(pin), str(cache)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_source_with_the_pinned_hash_is_unpacked(archive: Path, tmp_path: Path) -> None:
    done = fetch(archive, digest(archive), tmp_path / "cache", tmp_path / "mark")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "src" / "ggml.c").read_text() == FILES["vendor/ggml/src/ggml.c"]
    assert (tmp_path / "mark").exists()  # pip does run the back end, so its absence below means something


def test_of_a_source_with_another_hash_nothing_is_run_or_kept(archive: Path, tmp_path: Path) -> None:
    pinned = hashlib.sha256(b"what was reviewed").hexdigest()
    done = fetch(archive, pinned, tmp_path / "cache", tmp_path / "mark")
    assert done.returncode != 0
    assert not (tmp_path / "mark").exists()
    assert digest(archive) in done.stderr
    assert pinned in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cached_archive_with_another_hash_is_removed(archive: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / archive.name
    cached.parent.mkdir()
    cached.write_bytes(b"cut short")
    done = fetch(archive, digest(archive), tmp_path / "cache", tmp_path / "mark")
    assert done.returncode != 0
    assert hashlib.sha256(b"cut short").hexdigest() in done.stderr
    assert not cached.exists()


def test_a_package_that_is_nowhere_is_named(archive: Path, tmp_path: Path) -> None:
    pinned = digest(archive)
    archive.unlink()
    done = fetch(archive, pinned, tmp_path / "cache", tmp_path / "mark")
    assert done.returncode != 0
    assert f"{NAME}=={VERSION}" in done.stderr
