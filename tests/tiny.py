"""Seeded random GGUF pairs small enough for any test, written with the `gguf` package."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tools.synth.blocks import TYPES, Bytes, as_bytes, random_blocks
from tools.synth.layout import (
    MATRICES,
    DraftGeometry,
    Experts,
    Geometry,
    Slot,
    draft_metadata,
    draft_tensors,
    plain_values,
    target_metadata,
    target_tensors,
    type_of,
)
from tools.synth.vocabulary import build_vocabulary
from tools.synth.writer import Value

__all__ = [
    "GEOMETRIES",
    "K_QUANT_GEOMETRIES",
    "MOE_GEOMETRIES",
    "WEIGHT_TYPES",
    "Geometry",
    "write_draft",
    "write_target",
]

WEIGHT_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "q4_k_m")

# hidden, layers, interval, heads, kv_heads, head_dim, rope_dim, k_heads, v_heads, state, conv, ffn, vocab
GEOMETRIES = {
    # As many V heads as K heads, everything small.
    "equal": Geometry(128, 4, 4, 4, 2, 64, 16, 4, 4, 32, 4, 256, 320),
    # Three V heads for each K head.
    "ratio3": Geometry(256, 4, 4, 4, 2, 64, 32, 2, 6, 128, 4, 512, 384),
    # Head shapes of the 27B model: GQA 6, head width 256 with 64 rotated, ratio 3, state 128.
    "gqa6": Geometry(256, 4, 4, 6, 1, 256, 64, 2, 6, 128, 4, 768, 512),
    # The LM head is the embedding.
    "tied": Geometry(256, 4, 2, 4, 4, 64, 64, 2, 4, 64, 4, 512, 320, tied=True),
    # An odd number of layers, attention in every other one, a short convolution.
    "odd": Geometry(128, 5, 2, 2, 1, 64, 32, 4, 4, 32, 3, 192, 320, theta=1e6, eps=1e-5),
    "all_attention": Geometry(128, 3, 1, 4, 1, 64, 16, 4, 4, 32, 4, 256, 320),
    "all_recurrent": Geometry(128, 3, 100, 4, 2, 64, 16, 4, 8, 32, 4, 256, 320),
    # Layer kinds listed one by one, with a leading attention layer that no interval would give.
    "listed": Geometry(128, 4, 4, 4, 2, 64, 16, 4, 4, 32, 4, 256, 320, recurrent=(False, True, True, False)),
    # A multi-token-prediction block follows the model and has to be skipped.
    "mtp": Geometry(128, 4, 4, 4, 2, 64, 16, 4, 4, 32, 4, 256, 320, nextn=1),
}
# Rows of K-quants are multiples of 256 values.
K_QUANT_GEOMETRIES = ("ratio3", "gqa6", "tied")

# Models with experts (architecture `qwen35moe`).
MOE_GEOMETRIES = {
    # GQA 8, two V heads for each K head, as in the 35B model. Every row is a multiple of 256 values.
    "moe": Geometry(256, 4, 4, 8, 1, 64, 32, 2, 4, 64, 4, 0, 384, experts=Experts(8, 2, 256, 256)),
    # Gate and up matrices in one tensor, half of the experts selected, a shared expert of another width, an MTP block.
    "moe_fused": Geometry(
        128, 4, 4, 4, 2, 64, 16, 4, 8, 32, 4, 0, 320, nextn=1, experts=Experts(16, 8, 64, 128, fused=True, gate_rank=2)
    ),
}


def write_target(
    path: Path | str,
    geometry: Geometry,
    types: str = "f32",
    seed: int = 0,
    outliers: float | None = None,
    *,
    keys: Mapping[str, Value] | None = None,
    biases: Sequence[str] = (),
) -> Path:
    """Write a model with random weights of type `types` (one of WEIGHT_TYPES) and return its path.

    Its architecture is `qwen35`, or `qwen35moe` for a geometry with experts. The same seed gives the same weights in
    f32, f16, bf16, q8_0 and q4_0, up to rounding; K-quants have weights of their own. `outliers`: multiply a few
    channels of K by this factor and divide those of Q by it, which leaves attention as it is but is hard on a quantised
    cache. `keys` are more metadata of the architecture. `biases` names projections ("attn_q", ...) that get one in
    every layer that has them. ValueError if a row does not divide into blocks of the type.
    """
    layers = geometry.layers + geometry.nextn
    slots = [(slot, type_of(slot, types, layers, geometry.tied)) for slot in target_tensors(geometry)]
    wanted = [slot for slot, _ in slots if slot.name.endswith(tuple(f".{name}.weight" for name in biases))]
    slots += [(Slot(slot.name.replace("weight", "bias"), slot.shape[:1], "bias"), "f32") for slot in wanted]
    metadata = target_metadata(geometry, build_vocabulary(geometry.vocab), "tiny target")
    metadata |= {f"{geometry.architecture}.{key}": value for key, value in (keys or {}).items()}
    return _write(Path(path), metadata, slots, seed, _outlier_channels(geometry, outliers))


def write_draft(
    path: Path | str,
    target_geometry: Geometry,
    *,
    layers: int = 2,
    window: int | None = None,
    sliding: Sequence[bool] | None = None,
    taps: Sequence[int] | None = None,
    block_size: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    ffn: int = 256,
    types: str = "f32",
    causal: bool | None = None,
    layout: str = "llama.cpp",
    mask_token_id: int | None = None,
    theta: float = 1e7,
    seed: int = 1,
    keys: Mapping[str, Value] | None = None,
) -> Path:
    """Write a random draft for a target of `target_geometry` and return its path.

    `window` in tokens makes the layers marked in `sliding` (all but the last, unless given) sliding ones. `taps` are
    HF layer ids, by default the last three layers llama.cpp can tap. `causal` None leaves the key out of the file.
    `layout` is "llama.cpp" (architecture `dflash`) or "fork". `keys` are more metadata of the architecture.
    ValueError if a row does not divide into blocks.
    """
    vocabulary = build_vocabulary(target_geometry.vocab)
    pattern = [layer < layers - 1 for layer in range(layers)] if sliding is None else sliding
    draft = DraftGeometry(
        hidden=target_geometry.hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        # llama.cpp taps inputs of layers, so the last layer's output is out of its reach.
        taps=tuple(range(target_geometry.layers - 1))[-3:] if taps is None else tuple(taps),
        mask_token_id=vocabulary.mask_token_id if mask_token_id is None else mask_token_id,
        block_size=block_size,
        window=window,
        sliding=tuple(pattern) if window is not None else (),
        causal=causal,
        theta=theta,
        context=target_geometry.context,
    )
    slots = [(slot, type_of(slot, types, layers)) for slot in draft_tensors(draft, layout)]
    metadata = draft_metadata(draft, vocabulary, "tiny draft", layout)
    metadata |= {f"{metadata['general.architecture']}.{key}": value for key, value in (keys or {}).items()}
    return _write(Path(path), metadata, slots, seed, {})


def _outlier_channels(g: Geometry, factor: float | None) -> dict[str, npt.NDArray[np.float32]]:
    """Factors by tensor name. Both channels of a rotated pair get the same one, so that RoPE commutes with it."""
    if factor is None:
        return {}
    scale = np.ones(g.head_dim, np.float32)
    scale[[1, 1 + g.rope_dim // 2, g.head_dim - 2]] = factor
    if g.rope_dim == g.head_dim:
        scale[[g.rope_dim // 2 - 2]] = factor  # the partner of channel head_dim - 2
    attention = [layer for layer in range(g.layers) if not g.is_recurrent(layer)]
    keys = {f"blk.{layer}.attn_k_norm.weight": scale for layer in attention}
    queries = {f"blk.{layer}.attn_q_norm.weight": np.float32(1) / scale for layer in attention}
    return keys | queries


def _write(
    path: Path,
    metadata: dict[str, Value],
    slots: Iterable[tuple[Slot, str]],
    seed: int,
    factors: dict[str, npt.NDArray[np.float32]],
) -> Path:
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":  # GGUFWriter has written it
            _add(writer, key, value)
    for slot, name in slots:
        # A generator for each tensor: its values depend on its name, not on its place in the file.
        rng = np.random.default_rng([seed, zlib.crc32(slot.name.encode())])
        data = _data(slot, name, rng, factors.get(slot.name))
        writer.add_tensor(slot.name, data, raw_dtype=gguf.GGMLQuantizationType(TYPES[name].code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _data(slot: Slot, name: str, rng: np.random.Generator, factor: npt.NDArray[np.float32] | None) -> Bytes:
    """The tensor as bytes, the last axis a row's."""
    row_bytes = TYPES[name].row_bytes(slot.shape[-1])
    if name in ("q4_k", "q5_k", "q6_k"):
        # The gguf package cannot quantise these, so the blocks themselves are random.
        count = int(np.prod(slot.shape)) // TYPES[name].size
        return random_blocks(name, count, _std(slot), rng).reshape(*slot.shape[:-1], row_bytes)
    plain = slot.kind not in MATRICES
    values = plain_values(slot, rng) if plain else _std(slot) * rng.standard_normal(slot.shape)
    values = (values * (1 if factor is None else factor)).astype(np.float32)
    if name in ("f32", "f16", "bf16"):
        return as_bytes(values, name).reshape(*slot.shape[:-1], row_bytes)
    return gguf.quantize(values, gguf.GGMLQuantizationType(TYPES[name].code))


def _std(slot: Slot) -> float:
    """Spread of a matrix: products keep the scale of their input, and the LM head spreads the logits by about 4."""
    if slot.kind == "embedding":
        return 0.1  # little next to what the layers add: a tied head would repeat its input otherwise
    return (4.0 if slot.kind == "output" else 1.0) / float(np.sqrt(slot.shape[-1]))
