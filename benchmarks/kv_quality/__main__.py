"""What does a K/V cache type, or a rotation of K or V, cost in quality?

    python -m benchmarks.kv_quality pydflash/data/tiny-target.gguf --draft pydflash/data/tiny-draft.gguf \
        --weights f32 --outliers none,8x32 --json out.jsonl
    python -m benchmarks.kv_quality.table out.jsonl docs/kv-cache.md

Every pair of types, in every requested pair of bases, is compared with the f16/f16 cache of the same model on the same
held-out text, teacher forced: KL divergence, top-1 agreement, perplexity, error of the first attention output, recall
of planted codes, acceptance length of a draft. ``--outliers`` measures copies of the model that compute the same but
have large channels in K (copies.py); ``--weights f32`` a copy with f32 weights, in which no rounding of activations
hides what the cache does. Each cell prints the command that gives it alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.kv_quality.copies import Outliers, copy_model
from benchmarks.kv_quality.measure import AcceptancePlaces, Caches, Yardstick, grid
from benchmarks.kv_quality.table import Cell, Source
from benchmarks.kv_quality.texts import held_out_lines, held_out_prompts, texts
from benchmarks.speed import numbers
from pydflash.drafts import load_draft
from pydflash.kv_format import CACHE_TYPES
from pydflash.models import Model, load_model

PROMPTS = Path("tests/data/held_out.jsonl")
TYPES = [name for name in CACHE_TYPES if name != "f32"]  # f16 is what the others are compared with
ROTATIONS = "none,hadamard-256,hadamard-128,signed-128"


def names(text: str) -> list[str]:
    """'a,b' as a list."""
    return [part for part in text.split(",") if part]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="measure acceptance lengths with this draft")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON lines with prompt and continuation")
    parser.add_argument("--cache-k", type=names, default=TYPES, metavar="TYPE,...")
    parser.add_argument("--cache-v", type=names, default=TYPES, metavar="TYPE,...")
    parser.add_argument("--k-rotation", type=names, default=names(ROTATIONS), metavar="BASIS,...")
    parser.add_argument("--v-rotation", type=names, default=["none"], metavar="BASIS,...")
    parser.add_argument("--weights", choices=("file", "f32"), default="file", help="as stored, or a copy in f32")
    parser.add_argument("--outliers", type=names, default=["none"], metavar="CHANNELSxFACTOR,...", help="or none")
    parser.add_argument(
        "--contexts", type=numbers, default=[256, 512, 1024], metavar="N,...", help="tokens of each text"
    )
    parser.add_argument("--needles", type=int, default=6, metavar="N", help="codes planted in each text")
    parser.add_argument("--places", type=int, default=24, metavar="N", help="proposals of the draft, 4 a prompt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, help="append each cell here, one JSON object a line")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace, outliers: str, caches: Caches) -> str:
    """What gives one cell alone."""
    parts = ["python -m benchmarks.kv_quality", str(options.model)]
    if options.draft is not None:
        parts.append(f"--draft {options.draft}")
    if options.prompts != PROMPTS:
        parts.append(f"--prompts {options.prompts}")
    parts.append(f"--weights {options.weights} --outliers {outliers}")
    parts.append(f"--cache-k {caches.k} --cache-v {caches.v} --k-rotation {caches.k_rotation}")
    if caches.v_rotation != "none":
        parts.append(f"--v-rotation {caches.v_rotation}")
    defaults = _parse([str(options.model)])
    for name in ("contexts", "needles", "places", "device"):
        value = getattr(options, name)
        if value != getattr(defaults, name):
            parts.append(f"--{name} {','.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(parts)


def cells(model: Model, options: argparse.Namespace, outliers: str) -> Iterator[Cell]:
    """Measure every requested cache on one copy of the model."""
    encode = model.tokenizer.encode
    prompts = [encode(prompt) for prompt in held_out_prompts(options.prompts, options.places // 4)]
    lines = held_out_lines(options.prompts)
    yardstick = Yardstick(model, list(texts(lines, encode, options.contexts, options.needles)))
    draft = None if options.draft is None else load_draft(options.draft, model)
    try:
        places = None if draft is None else AcceptancePlaces(model, draft, prompts, 64)
        for caches in grid(options.cache_k, options.cache_v, options.k_rotation, options.v_rotation):
            quality = yardstick.measure(caches)
            acceptance = None if places is None else places.measure(caches)
            source = Source(options.model.name, options.weights, outliers, model.backend.description)
            yield Cell(source, caches, quality, acceptance, command(options, outliers, caches))
    finally:
        if draft is not None:
            draft.close()


def measure_copy(options: argparse.Namespace, outliers: str, folder: Path) -> None:
    """All cells of one copy of the model, which is written to ``folder``, printed and appended as they come."""
    path = options.model
    if outliers != "none" or options.weights == "f32":
        path = folder / "copy.gguf"
        wanted = None if outliers == "none" else Outliers.parse(outliers)
        copy_model(options.model, path, f32=options.weights == "f32", outliers=wanted)
    with load_model(path, options.device, threads=options.threads) as model:
        for cell in cells(model, options, outliers):
            print(cell, flush=True)
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(json.dumps(cell.record()) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    begin = time.perf_counter()
    for outliers in options.outliers:
        with tempfile.TemporaryDirectory() as folder:
            measure_copy(options, outliers, Path(folder))
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
