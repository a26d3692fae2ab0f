"""GGUF files of targets and drafts whose header, metadata, tensor directory or tensor data were changed."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pydflash.config import EngineConfig
from pydflash.decode import SamplingParams
from pydflash.drafts import load_draft
from pydflash.engine import Engine
from pydflash.files import GGUFFile
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from tests.fuzz.drivers.edits import INTEGERS, REALS, TEXTS, edit_bytes, raw_edits
from tests.fuzz.gguf_image import ARRAY, SCALARS, STRING, Image, Key, Tensor

__all__ = ["Models"]

FILES = ("target", "target", "target", "experts", "draft", "draft", "fork")
FILLS: dict[str, Callable[[int], bytes]] = {
    "nan": lambda size: np.full(size // 4 + 1, np.nan, np.float32).tobytes()[:size],
    "inf": lambda size: np.full(size // 4 + 1, np.inf, np.float32).tobytes()[:size],
    "large": lambda size: np.full(size // 4 + 1, 3e38, np.float32).tobytes()[:size],
    "ff": lambda size: b"\xff" * size,
    "7c": lambda size: b"\x00\x7c" * (size // 2) + b"\0" * (size % 2),
    "zero": lambda size: bytes(size),
    "random": lambda size: random.Random(size).randbytes(size),
}
PROMPT = "hello <|im_end|> e\u0301 \u65e5 def f(x):"
CONFIG = EngineConfig(device="cpu", max_context=64, chunk=128)


class Models:
    def __init__(self, folder: Path) -> None:
        self._contents = {name: (folder / f"{name}.gguf").read_bytes() for name in set(FILES)}
        self._images = {name: Image.parse(content) for name, content in self._contents.items()}
        self._target = load_model(folder / "target.gguf", "cpu", threads=1)
        self._work = tempfile.TemporaryDirectory()

    # --- recipes ----------------------------------------------------------------------------------------------------

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        name = rng.choice(FILES)
        if rng.random() < 0.15:
            return {"file": name, "raw": raw_edits(rng, len(self._contents[name]))}
        makers = (_change_key, _change_key, _change_key, _change_tensor, _change_tensor, _change_data, _change_header)
        edits = [rng.choice(makers)(rng, self._images[name]) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        return {"file": name, "edits": edits}

    def run(self, recipe: dict[str, Any]) -> None:
        name = recipe["file"]
        content = self._contents[name]
        if "edits" in recipe:
            image = Image.parse(content)
            for what, *arguments in recipe["edits"]:
                _APPLY[what](image, *arguments)
            content = image.serialise()
        path = Path(self._work.name) / "changed.gguf"
        path.write_bytes(edit_bytes(content, recipe.get("raw", [])))
        with GGUFFile.open(path) as file:
            file.describe()
            file.fingerprint_digest()
        (_use_draft if name in ("draft", "fork") else _use_target)(path, self._target)


def _use_target(path: Path, _target: Model) -> None:
    with load_model(path, "cpu", threads=1) as model:
        with Engine.share(model, None, CONFIG) as engine:
            engine.explain()
            engine.encode([{"role": "user", "content": PROMPT}])
            ids = model.tokenizer.encode(PROMPT, special=False)
            model.tokenizer.decode(ids)
            engine.generate(PROMPT, SamplingParams(max_tokens=3))
        with Session(model, 64, "q8_0", "q4_0") as session:
            session.forward(ids[:3], "all").fetch()
            session.commit(2)
            session.forward([5] * 20).fetch()
            session.commit(20)
            session.restore(session.snapshot())


def _use_draft(path: Path, target: Model) -> None:
    draft = load_draft(path, target)
    try:
        with Engine.share(target, draft, CONFIG) as engine:
            engine.explain()
            engine.generate([7] * 20, SamplingParams(max_tokens=12, ignore_eos=True))
            assert engine.draft_session is not None
            engine.draft_session.snapshot()  # type: ignore[attr-defined]
    finally:
        draft.close()


# --- edits: each made by a function of the random numbers and the good file -------------------------------------------


def _change_header(rng: random.Random, _image: Image) -> list[Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return ["magic", rng.randbytes(4).hex()]
    if kind == 1:
        return ["version", rng.choice((0, 1, 2, 3, 4, 0x03000000, 2**32 - 1))]
    return ["counts", rng.choice(INTEGERS), 0] if kind == 2 else ["counts", 0, rng.choice(INTEGERS)]


def _change_key(rng: random.Random, image: Image) -> list[Any]:
    key = rng.choice(image.keys)
    kind = rng.randrange(12)
    if kind == 0:
        return ["drop key", key.name]
    if kind == 1:
        return ["copy key", key.name]
    if kind == 2:
        return ["rename key", key.name, rng.choice((*TEXTS, key.name.swapcase()))]
    if kind == 3:
        return ["claim", key.name, rng.choice(INTEGERS)]
    if kind == 4 and key.kind == ARRAY:
        return ["item", key.name, rng.randrange(1 << 16), _number_or_text(rng, key.value[0])]
    if kind == 5 and key.kind == ARRAY:
        return ["length", key.name, rng.choice((0, 1, 2, 3, 100, 319, 321))]
    if kind < 9:  # the right type, another value
        return ["set", key.name, key.kind, _value(rng, key.kind)]
    other = rng.choice((*SCALARS, STRING, ARRAY, ARRAY, 13, 255))
    return ["set", key.name, other, _value(rng, other)]


def _value(rng: random.Random, kind: int, depth: int = 0) -> Any:
    if kind != ARRAY:
        return _number_or_text(rng, kind)
    item = rng.choice((*SCALARS, STRING, STRING, 5, ARRAY)) if depth < 6 else 4
    return [
        item,
        [_value(rng, item, depth + 1) for _ in range(rng.choice((0, 1, 2, 3, 4, 8, 320)) if depth < 2 else 1)],
    ]


def _number_or_text(rng: random.Random, kind: int) -> Any:
    if kind == STRING:
        return rng.choice(TEXTS)
    return rng.choice(REALS) if kind in (6, 12) else rng.choice(INTEGERS)


def _change_tensor(rng: random.Random, image: Image) -> list[Any]:
    tensor = rng.choice(image.tensors)
    kind = rng.randrange(8)
    if kind == 0:
        return ["drop tensor", tensor.name]
    if kind == 1:
        return ["copy tensor", tensor.name]
    if kind == 2:
        other = rng.choice(image.tensors).name
        return ["tensor", tensor.name, "name", rng.choice((*TEXTS, other, "x" * 64, tensor.name + ".scale"))]
    if kind == 3:
        return ["tensor", tensor.name, "kind", rng.choice((*range(45), 2**31, 2**32 - 1))]
    if kind == 4:
        return ["tensor", tensor.name, "offset", rng.choice((*INTEGERS, tensor.offset + 32))]
    shape = list(tensor.shape)
    axis = rng.randrange(len(shape))
    if kind == 5:
        shape[axis] = rng.choice(INTEGERS)
    elif kind == 6:
        shape.insert(axis, rng.choice((1, 1, 2, 0)))
    else:
        shape = shape[::-1] if rng.random() < 0.5 else [rng.choice(INTEGERS) for _ in range(rng.randrange(7))]
    return ["tensor", tensor.name, "shape", shape]


def _change_data(rng: random.Random, image: Image) -> list[Any]:
    return ["fill", rng.choice(image.tensors).name, rng.choice(list(FILLS)), rng.choice((1, 4, 64, 1 << 20))]


# Applied to an image: an edit of a key or a tensor that an earlier one took away does nothing.


def _key(image: Image, name: str) -> Key:
    return next((key for key in image.keys if key.name == name), Key("", STRING, ""))


def _tensor(image: Image, name: str) -> Tensor:
    return next((tensor for tensor in image.tensors if tensor.name == name), Tensor("", [], 0, len(image.data)))


def _set_key(image: Image, name: str, kind: int, value: Any) -> None:
    key = _key(image, name)
    key.kind, key.value, key.claims = kind, value, None


def _set_item(image: Image, name: str, at: int, value: Any) -> None:
    key = _key(image, name)
    if key.kind != ARRAY:
        return
    kind, items = key.value
    if items and kind != ARRAY and (kind == STRING) == isinstance(value, str):
        items[at % len(items)] = value


def _set_length(image: Image, name: str, length: int) -> None:
    key = _key(image, name)
    if key.kind == ARRAY:
        key.value = (key.value[0], (key.value[1] * 2)[:length])


def _fill(image: Image, name: str, pattern: str, size: int) -> None:
    start = _tensor(image, name).offset
    later = [tensor.offset for tensor in image.tensors if tensor.offset > start]
    end = min([start + size, *later, len(image.data)])
    if start < end:
        image.data[start:end] = FILLS[pattern](end - start)


def _drop(entries: list[Any], name: str) -> None:
    entries[:] = [entry for entry in entries if entry.name != name]


def _set_counts(image: Image, tensors: int, keys: int) -> None:
    image.more_tensors, image.more_keys = tensors, keys


_APPLY: dict[str, Callable[..., Any]] = {
    "magic": lambda image, text: setattr(image, "magic", bytes.fromhex(text)),
    "version": lambda image, number: setattr(image, "version", number),
    "counts": _set_counts,
    "drop key": lambda image, name: _drop(image.keys, name),
    "copy key": lambda image, name: image.keys.append(_key(image, name)),
    "rename key": lambda image, name, new: setattr(_key(image, name), "name", new),
    "claim": lambda image, name, count: setattr(_key(image, name), "claims", count),
    "item": _set_item,
    "length": _set_length,
    "set": _set_key,
    "drop tensor": lambda image, name: _drop(image.tensors, name),
    "copy tensor": lambda image, name: image.tensors.append(_tensor(image, name)),
    "tensor": lambda image, name, field, value: setattr(_tensor(image, name), field, value),
    "fill": _fill,
}
