"""Fetch the pinned ggml: download the source distribution by package name, check its hash, unpack one folder.

Called by CMake (vendor/ggml.cmake) as ``python fetch.py PIN CACHE_DIR``; prints the folder that holds ggml's
CMakeLists.txt.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def read_pin(path: Path) -> dict[str, str]:
    """The ``key = "value"`` lines of the pin (Python 3.10 has no TOML parser in its library)."""
    return dict(re.findall(r'^(\w+)\s*=\s*"([^"]*)"', path.read_text(), flags=re.MULTILINE))


def download(pin: dict[str, str], into: Path) -> Path:
    """The source distribution in ``into``, downloaded with pip unless it is already there.

    pip compares the hash before it runs the package's build back end, which it does for its name and version.
    """
    archive = into / f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
    if not archive.exists():
        _pip_download(pin, into)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != pin["sha256"]:
        archive.unlink()
        sys.exit(f"{archive.name}: sha256 is {digest}, the pin says {pin['sha256']}; the file was removed, try again")
    return archive


def _pip_download(pin: dict[str, str], into: Path) -> None:
    """Ends the program with what was found unless the file has the hash of the pin."""
    package = f"{pin['package']}=={pin['version']}"
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{package} --hash=sha256:{pin['sha256']}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
             "--require-hashes", "--dest", str(into), "--requirement", str(requirements)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    if done.returncode == 0:
        return
    found = re.search(r"Got\s+([0-9a-f]{64})", done.stdout)
    if found:
        sys.exit(
            f"{package}: sha256 is {found[1]}, the pin says {pin['sha256']}; none of its code was run; check where pip"
            " downloads from"
        )
    sys.exit(f"{package}: pip could not download it; it said:\n{done.stdout.strip()}")


def unpack(archive: Path, folder: str, into: Path) -> None:
    """Only ``folder`` of the archive, moved into place when it is complete."""
    partial = into.with_name(into.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        root = tar.next()
        assert root is not None, f"{archive} is empty"
        prefix = f"{root.name.split('/')[0]}/{folder}/"
        for member in tar:
            if member.name.startswith(prefix) and (member.isfile() or member.isdir()):
                member.name = member.name[len(prefix) :]
                tar.extract(member, partial)
    partial.rename(into)


def main() -> None:
    pin, cache = read_pin(Path(sys.argv[1])), Path(sys.argv[2])
    target = cache / f"ggml-{pin['sha256'][:12]}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unpack(download(pin, cache), pin["folder"], target)
    print(target)


if __name__ == "__main__":
    main()
