"""Drafts to convert whose config.json or safetensors file was changed."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from pydflash.drafts import load_draft
from pydflash.files.convert import convert_draft
from pydflash.models import load_model
from tests.fuzz.drivers.edits import TEXTS, edit_bytes, raw_edits, scalar

__all__ = ["Conversions"]

TYPES = ("q8_0", "q8_0", "q4_0", "f16", "bf16", "f32")


class Conversions:
    def __init__(self, folder: Path) -> None:
        self._target_path = folder / "target.gguf"
        self._target = load_model(self._target_path, "cpu", threads=1)
        self._config = json.loads((folder / "hf" / "config.json").read_text())
        self._tensors = (folder / "hf" / "model.safetensors").read_bytes()
        (length,) = struct.unpack_from("<Q", self._tensors)
        self._header = json.loads(self._tensors[8 : 8 + length])
        self._data = self._tensors[8 + length :]
        self._work = tempfile.TemporaryDirectory()

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        recipe: dict[str, Any] = {"type": rng.choice(TYPES)}
        kind = rng.randrange(8)
        if kind < 4:
            edits = [[*_config_place(rng, self._config), scalar(rng)] for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            return recipe | {"config": edits}
        if kind == 4:
            text = rng.choice(("[", '{"a":', "", "{", "null", "[]", "1", '"a"', "\x00"))
            return recipe | {"config text": [text, rng.choice((1, 5000, 200_000))]}
        if kind == 5:
            return recipe | {"config bytes": raw_edits(rng, len(json.dumps(self._config)))}
        if kind == 6:
            return recipe | {"raw": raw_edits(rng, len(self._tensors))}
        return recipe | {"header": [_header_edit(rng, self._header) for _ in range(rng.choice((1, 1, 2)))]}

    def run(self, recipe: dict[str, Any]) -> None:
        folder = Path(self._work.name) / "hf"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = copy.deepcopy(self._config)
        for inner, key, value in recipe.get("config", []):
            place = config.get("dflash_config") if inner else config
            if isinstance(place, dict):
                place[key] = value
        text, times = recipe.get("config text", (json.dumps(config), 1))
        content = edit_bytes((text * times).encode(), recipe.get("config bytes", []))
        (folder / "config.json").write_bytes(content)
        (folder / "model.safetensors").write_bytes(self._edited_tensors(recipe))
        out = Path(self._work.name) / "out.gguf"
        convert_draft(folder, out, target=self._target_path, type=recipe["type"], progress=lambda done, total: None)
        load_draft(out, self._target).close()

    def _edited_tensors(self, recipe: dict[str, Any]) -> bytes:
        if "header" not in recipe:
            return edit_bytes(self._tensors, recipe.get("raw", []))
        header = copy.deepcopy(self._header)
        for name, field, value in recipe["header"]:
            if field == "name" and name in header:
                header[value] = header.pop(name)
            elif field == "entry":
                header[name] = value
            elif field == "drop":
                header.pop(name, None)
            elif isinstance(header.get(name), dict):
                header[name][field] = value
        text = "[" * 200_000 if recipe["header"][0][1] == "deep" else json.dumps(header)
        return struct.pack("<Q", len(text)) + text.encode() + self._data


def _config_place(rng: random.Random, config: dict[str, Any]) -> tuple[bool, str]:
    """Whether a key is in the inner configuration, and the key."""
    if rng.random() < 0.3:
        return True, rng.choice([*config["dflash_config"], "block_size", "causal", "hidden_size", "rope_theta"])
    return False, rng.choice([*config, "causal", "mask_token_id", "rope_parameters"])


def _header_edit(rng: random.Random, header: dict[str, Any]) -> list[Any]:
    name = rng.choice(list(header))
    field = rng.choice(("dtype", "shape", "shape", "data_offsets", "data_offsets", "name", "entry", "drop", "deep"))
    value = scalar(rng)
    if field == "name":
        value = rng.choice((*TEXTS, name.upper(), f"model.{name}", rng.choice(list(header))))
    if field == "shape" and rng.random() < 0.7:
        value = [rng.choice((0, 1, 2, 64, 128, 2**31, 2**63, -1, 0.5)) for _ in range(rng.randrange(6))]
    if field == "data_offsets" and rng.random() < 0.7:
        value = [rng.choice((0, 1, 4, 256, 2**40, -1, 0.5)) for _ in range(rng.randrange(1, 4))]
    return [name, field, value]
