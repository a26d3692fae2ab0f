"""`python -m tools.synth target|draft OUT.gguf`: write a random file with the geometry of a real model."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from .blocks import TYPES, Pool, as_bytes
from .layout import (
    MATRICES,
    DraftGeometry,
    Experts,
    Geometry,
    Slot,
    default_taps,
    draft_metadata,
    draft_tensors,
    plain_values,
    target_metadata,
    target_tensors,
    type_of,
)
from .vocabulary import build_vocabulary
from .writer import Tensor, Value, write_gguf

TARGETS = {
    "27b": Geometry(5120, 64, 4, 24, 4, 256, 64, 16, 48, 128, 4, 17408, 248_320, context=262_144),
    "35b-a3b": Geometry(
        2048, 40, 4, 16, 2, 256, 64, 16, 32, 128, 4, 0, 248_320, context=262_144, experts=Experts(256, 8, 512, 512)
    ),
    "0.7b": Geometry(1024, 24, 4, 8, 2, 256, 64, 8, 24, 128, 4, 4096, 65_536, context=32_768),
    "tiny": Geometry(256, 8, 4, 6, 1, 256, 64, 2, 6, 128, 4, 768, 512),
}
# Heads, KV heads, head width, FFN width and window of the draft that goes with each target; all have five layers.
DRAFTS = {
    "27b": (32, 8, 128, 17408, 2048),
    "35b-a3b": (32, 4, 128, 6144, 2048),
    "0.7b": (8, 2, 128, 3072, 2048),
    "tiny": (4, 1, 128, 768, 64),
}
STD = 0.02  # spread of every matrix, as initialised models have it


def parse_geometry(text: str) -> tuple[str, Geometry]:
    """`27b` or `27b,layers=8,vocab=65536`: the preset's name and its geometry with the named fields replaced."""
    name, *changes = text.split(",")
    if name not in TARGETS:
        raise argparse.ArgumentTypeError(f"unknown geometry {name!r}; known are {', '.join(TARGETS)}")
    fields = {f.name for f in dataclasses.fields(Geometry)} - {"recurrent", "experts"}
    values: dict[str, int | float | bool] = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in fields:
            raise argparse.ArgumentTypeError(f"unknown field {key!r}; known are {', '.join(sorted(fields))}")
        parse = {"theta": float, "eps": float, "tied": lambda v: v.lower() in ("1", "true")}.get(key, int)
        values[key] = parse(value)  # type: ignore[operator]
    return name, dataclasses.replace(TARGETS[name], **values)  # type: ignore[arg-type]


def draft_geometry(name: str, target: Geometry) -> DraftGeometry:
    """The draft that goes with preset `name`: four sliding layers and a full one, five taps, block 16."""
    heads, kv_heads, head_dim, ffn, window = DRAFTS[name]
    return DraftGeometry(
        hidden=target.hidden,
        layers=5,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        taps=default_taps(target.layers, 5),
        mask_token_id=build_vocabulary(target.vocab).mask_token_id,
        window=window,
        sliding=(True, True, True, True, False),
        context=target.context,
    )


def write(path: Path, metadata: dict[str, Value], slots: Iterable[tuple[Slot, str]], seed: int) -> int:
    """Write the tensors `(slot, type name)` with random data; returns the size of the file in bytes."""
    rng = np.random.default_rng(seed)
    pools: dict[str, Pool] = {}
    tensors = []
    for slot, name in slots:
        chunks: Callable[[], Iterable[memoryview]]
        if slot.kind in MATRICES:
            if name not in pools:
                pools[name] = Pool(name, STD, rng)
            chunks = partial(pools[name].cut, slot.shape, int(rng.integers(1 << 40)))
        else:
            chunks = partial(iter, [as_bytes(plain_values(slot, rng), name).reshape(-1).data])
        tensors.append(Tensor(slot.name, slot.shape, TYPES[name], chunks))
    return write_gguf(path, metadata, tensors)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.synth", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plain = ["f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k"]
    for command, option, default, choices in (
        ("target", "--mix", "q4_k_m", ["q4_k_m", *plain]),
        ("draft", "--type", "q8_0", plain),
    ):
        sub = commands.add_parser(command)
        sub.add_argument("out", type=Path, metavar="OUT.gguf")
        sub.add_argument("--geometry", type=parse_geometry, default="27b", metavar="NAME[,FIELD=VALUE...]")
        sub.add_argument(option, dest="mix", default=default, choices=choices)
        sub.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    name, geometry = options.geometry
    vocabulary = build_vocabulary(geometry.vocab)
    began = time.perf_counter()
    if options.command == "target":
        metadata = target_metadata(geometry, vocabulary, f"synthetic {geometry.architecture} {name}")
        layers = geometry.layers + geometry.nextn
        slots = [(s, type_of(s, options.mix, layers, geometry.tied)) for s in target_tensors(geometry)]
    else:
        draft = draft_geometry(name, geometry)
        metadata = draft_metadata(draft, vocabulary, f"synthetic dflash {name}")
        slots = [(s, type_of(s, options.mix, draft.layers)) for s in draft_tensors(draft)]
    size = write(options.out, metadata, slots, options.seed)
    seconds = time.perf_counter() - began
    billions = sum(math.prod(slot.shape) for slot, _ in slots) / 1e9
    print(f"{options.out}: {billions:.2f} B parameters, {len(slots)} tensors, {size / 2**30:.2f} GiB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
