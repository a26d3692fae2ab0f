"""Snapshot files with changed bytes, and files with other contents under a valid checksum."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

from pydflash.drafts import Draft, DraftSession, load_draft
from pydflash.models import load_model
from pydflash.runtime import Session
from pydflash.state import Snapshot
from tests.fuzz.drivers.edits import edit_bytes, raw_edits, scalar

__all__ = ["Snapshots"]

FILES = ("target", "target", "draft")


class Snapshots:
    def __init__(self, folder: Path) -> None:
        self._contents = {name: (folder / f"{name}.snapshot").read_bytes() for name in set(FILES)}
        self._good = Snapshot.load(folder / "target.snapshot")
        model = load_model(folder / "target.gguf", "cpu", threads=1)
        draft = load_draft(folder / "draft.gguf", model)
        assert isinstance(draft, Draft)
        self._session = Session(model, 64, capture=draft.taps)
        self._proposer = DraftSession(draft, self._session)
        self._work = tempfile.TemporaryDirectory()

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        name = rng.choice(FILES)
        if rng.random() < 0.3:
            return {"file": name, "raw": raw_edits(rng, len(self._contents[name]))}
        statement, arrays, _ = _parse(self._contents[name])
        places = list(_places(statement))
        edits: list[list[Any]] = []
        for _ in range(rng.choice((0, 1, 1, 2))):
            edits.append(["statement", rng.choice(places), scalar(rng)])
        for _ in range(rng.choice((0, 0, 1, 2)) if edits else 1):
            edits.append(_change_array(rng, list(arrays)))
        return {"file": name, "edits": edits}

    def run(self, recipe: dict[str, Any]) -> None:
        content = self._contents[recipe["file"]]
        if "edits" in recipe:
            statement, arrays, data = _parse(content)
            for what, *arguments in recipe["edits"]:
                if what == "statement":
                    _set(statement, *arguments)
                else:
                    _edit_array(arrays, *arguments)
            content = _forge(statement, arrays, data)
        path = Path(self._work.name) / "changed.snapshot"
        path.write_bytes(edit_bytes(content, recipe.get("raw", [])))
        found = Snapshot.load(path)
        if recipe["file"] == "target":
            self._session.restore(found)
        else:
            self._session.restore(self._good)
            self._proposer.restore(found)
        self._go_on(recipe["file"] == "draft")

    def _go_on(self, with_draft: bool) -> None:
        """What was restored is used, whatever it holds."""
        if with_draft:
            proposal = self._proposer.propose([5])
            self._session.forward(proposal, "all").fetch()
            self._session.commit(1)
            self._proposer.commit(1)
        self._session.forward([1, 2, 3], "all").fetch()
        self._session.commit(3)
        self._session.snapshot()


# --- the file, taken apart and put together ---------------------------------------------------------------------------


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, dict[str, Any]], bytes]:
    """The statement, the entries of the arrays, and the data."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    return json.loads(header.pop("__metadata__")["pydflash.snapshot"]), header, content[8 + length :]


def _forge(statement: dict[str, Any], arrays: dict[str, dict[str, Any]], data: bytes) -> bytes:
    """A file whose checksum is right, and whose data reach as far as its arrays say."""
    text = json.dumps(statement, separators=(",", ":"))
    end = max((entry["data_offsets"][1] for entry in arrays.values()), default=0)
    data = data[: max(end, 0)] + bytes(min(max(end - len(data), 0), 1 << 20))
    digest = hashlib.sha256(text.encode(errors="surrogatepass") + data).hexdigest()
    header = {"__metadata__": {"pydflash.snapshot": text, "sha256": digest}, **arrays}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + data


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Paths to every value inside."""
    if path:
        yield list(path)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _set(value: Any, path: list[Any], new: Any) -> None:
    for key in path[:-1]:
        value = value[key] if isinstance(value, dict | list) and _has(value, key) else {}
    if isinstance(value, dict | list) and _has(value, path[-1]):
        value[path[-1]] = new


def _has(value: Any, key: Any) -> bool:
    return key in value if isinstance(value, dict) else isinstance(key, int) and key < len(value)


def _change_array(rng: random.Random, names: list[str]) -> list[Any]:
    name = rng.choice(names)
    kind = rng.choice(("drop", "rename", "dtype", "rows", "shape", "data"))
    value = {"rename": rng.choice(("k.0", "k.99", "x", "")), "dtype": rng.choice(("F32", "U8", "F16", "I64", 5)),
             "rows": rng.randrange(40), "shape": scalar(rng), "data": rng.randrange(256)}.get(kind)  # fmt: skip
    return ["array", name, kind, value]


def _edit_array(arrays: dict[str, dict[str, Any]], name: str, kind: str, value: Any) -> None:
    if name not in arrays:
        return
    entry = arrays[name]
    if kind == "drop":
        del arrays[name]
    elif kind == "rename":
        arrays[value] = arrays.pop(name)
    elif kind == "dtype":
        entry["dtype"] = value
    elif kind == "shape":
        entry["shape"] = value
    elif kind == "rows" and isinstance(entry["shape"], list) and entry["shape"] and type(entry["shape"][0]) is int:
        row = (entry["data_offsets"][1] - entry["data_offsets"][0]) // max(entry["shape"][0], 1)
        moved = row * (value - entry["shape"][0])
        entry["shape"] = [value, *entry["shape"][1:]]
        entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][1] + moved]
