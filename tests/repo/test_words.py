"""Nothing private in the text: no machine, no registry host, no unfinished business."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
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
    read = 0
    for path in tracked_text():
        text = path.read_text(encoding="utf-8")
        for pattern in FORBIDDEN:
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(ROOT)} holds {found.group()!r}"
        read += 1
    assert read > 100
