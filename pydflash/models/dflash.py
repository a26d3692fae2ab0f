"""The DFlash draft (arXiv:2602.06036): a few Qwen3-style layers that fill a block of masks in one pass.

The draft has no embedding and no head; it uses the target's. What it knows of the text are fused *features* of the
target: residual streams tapped after some layers, projected and normalised, whose K and V are injected into every
layer. A block is [anchor, MASK, MASK, ...] at positions start, start+1, ...; row i proposes the token at position
start + i. T rows of a step; H, Hkv, D query heads, key/value heads and their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydflash import ops
from pydflash.errors import BadMetadata, DraftMismatch
from pydflash.files import GGUFFile
from pydflash.limits import EXACT_ROWS
from pydflash.models.keys import Keys
from pydflash.models.rope import read_rope
from pydflash.models.weights import Linear, Weights
from pydflash.native import Shape, Tensor
from pydflash.ops import NormRope, Rope
from pydflash.state import Ring, RingBatch, RingSpec

__all__ = ["ARCHITECTURES", "DFlash", "DraftConfig"]

_MOST_TAPS = 64
ARCHITECTURES = ("dflash", "dflash-draft", "qwen35-dflash-draft")
"""Names that files use as ``general.architecture``."""


@dataclass(frozen=True)
class DraftConfig:
    """Hyperparameters of a draft. ``taps``: target layers (0-based) after which the residual stream is tapped, in
    order.

    ``windows``: per layer, the sliding window or 0 for full attention. ``causal``: per layer, whether block rows see
    only earlier rows of the block; ``causal_source``: who says so. ``vocab``: tokens of the target, 0 if the file is
    silent.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    rope: Rope
    eps: float
    block_size: int
    mask_token_id: int
    taps: tuple[int, ...]
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    causal_source: str
    vocab: int

    @classmethod
    def read(cls, file: GGUFFile, causal: bool | None = None) -> DraftConfig:
        """From a file's metadata, in either layout (tensor names decide which).

        ``causal`` overrides what the file says about the rows inside a block, for every layer. Without it and without a
        key 'attention.causal', sliding layers are causal inside the block and full layers are not. Raises BadMetadata.
        """
        prefix = file.require("general.architecture", str)
        keys = Keys(file, prefix)
        number = keys.number
        fork, held = _is_fork(file), len(file.tensors)
        layers = file.require_within(f"{prefix}.block_count", 1, held, because=f"the file holds {held} tensors")
        windows, head_size = _windows(file, prefix, layers), number("attention.key_length")
        in_file = file.get(f"{prefix}.attention.causal", bool, default=None)
        said = in_file if causal is None else causal
        if fork:
            taps = file.integers(f"{prefix}.dflash.target_layer_ids", _MOST_TAPS)
            mask = f"{prefix}.dflash.mask_token_id"
        else:
            taps = [layer - 1 for layer in file.integers(f"{prefix}.target_layers", _MOST_TAPS)]
            mask = "tokenizer.ggml.mask_token_id"
        config = cls(
            layers=layers,
            hidden=number("embedding_length"),
            ffn=number("feed_forward_length"),
            heads=number("attention.head_count"),
            kv_heads=number("attention.head_count_kv"),
            head_size=head_size,
            rope=read_rope(file, f"{prefix}.", number("rope.dimension_count", default=head_size), head_size),
            eps=keys.real("attention.layer_norm_rms_epsilon"),
            block_size=number("dflash.block_size" if fork else "block_size"),
            mask_token_id=int(file.require(mask, int)),
            taps=tuple(taps),
            windows=windows,
            causal=tuple(bool(w) if said is None else said for w in windows),
            causal_source=_causal_source(causal, said),
            vocab=number("vocab_size", 0, default=0),
        )
        config._check(keys)
        return config

    def _check(self, keys: Keys) -> None:
        values = keys.number("attention.value_length", default=self.head_size)
        rules = [
            (
                2 <= self.block_size <= EXACT_ROWS,
                f"block_size is {self.block_size}; 2 to {EXACT_ROWS} are supported",
            ),
            (self.heads % self.kv_heads == 0, f"{self.heads} heads over {self.kv_heads} K/V heads"),
            (self.head_size in (64, 128, 256), f"heads of {self.head_size}; 64, 128 and 256 are supported"),
            (0.0 < self.eps < 1.0, f"layer_norm_rms_epsilon is {self.eps}"),
            (len(self.taps) >= 1, "0 target layers; 1 to 64 are supported"),
            (values == self.head_size, f"attention.value_length is {values}, key_length {self.head_size}"),
            (self.mask_token_id >= 0, f"mask_token_id is {self.mask_token_id}"),
        ]
        for holds, found in rules:
            if not holds:
                raise BadMetadata(f"{keys.file.path}: {found}")
        keys.check_sections(self.rope.dims // 2, interleaved=False)

    def check_target(self, path: object, layers: int, hidden: int, vocab: int) -> None:
        """DraftMismatch, naming both values, unless the draft fits a target with ``layers``, ``hidden`` and
        ``vocab``."""
        if self.hidden != hidden:
            raise DraftMismatch(f"{path}: the draft's hidden size is {self.hidden}, the target's {hidden}")
        if not all(0 <= tap < layers for tap in self.taps):
            raise DraftMismatch(
                f"{path}: the draft taps layers {list(self.taps)}, the target has layers 0..{layers - 1}"
            )
        if self.mask_token_id >= vocab:
            raise DraftMismatch(
                f"{path}: the draft's mask token is {self.mask_token_id}, the target's vocabulary holds {vocab}"
            )
        if self.vocab not in (0, vocab):
            raise DraftMismatch(f"{path}: the draft is for a vocabulary of {self.vocab} tokens, the target has {vocab}")

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of the forward pass: name (of the llama.cpp layout) to row-major shape."""
        c, q, kv = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: dict[str, Shape] = {
            "fc.weight": (c, len(self.taps) * c), "enc.output_norm.weight": (c,), "output_norm.weight": (c,),
        }  # fmt: skip
        for i in range(self.layers):
            block: dict[str, Shape] = {
                "attn_norm": (c,), "ffn_norm": (c,), "attn_q_norm": (self.head_size,), "attn_k_norm": (self.head_size,),
                "attn_q": (q, c), "attn_k": (kv, c), "attn_v": (kv, c), "attn_output": (c, q),
                "ffn_gate": (self.ffn, c), "ffn_up": (self.ffn, c), "ffn_down": (c, self.ffn),
            }  # fmt: skip
            shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        return shapes


def _is_fork(file: GGUFFile) -> bool:
    """The layout of llama.cpp's forks: ``dflash.*`` tensor names, raw layer ids."""
    return any(name in file.tensors for name in ("dflash.fc.weight", "dflash_fc.weight"))


def tensor_names(file: GGUFFile, expected: Mapping[str, Shape]) -> dict[str, str]:
    """The file's own name for each expected tensor."""
    if not _is_fork(file):
        return {name: name for name in expected}
    other = {"fc.weight": "fc.weight", "enc.output_norm.weight": "hidden_norm.weight"}
    names: dict[str, str] = {}
    for name in expected:
        candidates = [name, name.replace(".ffn_norm.", ".post_attention_norm.")]
        if name in other:
            candidates = [f"dflash.{other[name]}", f"dflash_{other[name]}"]
        names[name] = next((c for c in candidates if c in file.tensors), candidates[0])
    return names


def _causal_source(given: bool | None, said: bool | None) -> str:
    if given is not None:
        return "draft_causal"
    return "the draft does not say: sliding layers are causal, full ones are not" if said is None else "draft"


def _windows(file: GGUFFile, prefix: str, layers: int) -> tuple[int, ...]:
    """Per layer: the sliding window, or 0."""
    window, key = (
        file.get(f"{prefix}.attention.sliding_window", int, default=0),
        f"{prefix}.attention.sliding_window_pattern",
    )
    listed = key in file.metadata
    pattern: Sequence[int] = file.integers(key, len(file.tensors)) if listed else [window > 0] * layers
    if len(pattern) != layers or not 0 <= window <= 1 << 24 or (any(pattern) and not window):
        raise BadMetadata(
            f"{file.path}: sliding_window {window} with pattern {list(pattern)} does not fit {layers} layers"
        )
    return tuple(window if sliding else 0 for sliding in pattern)


class DraftLayer:
    """Attention over [injected context | block], then SwiGLU; plain Qwen3 norms."""

    def __init__(self, weights: Weights, names: Mapping[str, str], layer: int, config: DraftConfig) -> None:
        def named(name: str) -> Tensor:
            return weights[names[f"blk.{layer}.{name}.weight"]]

        def linear(name: str) -> Linear:
            return Linear(named(name))

        def norm_rope(name: str) -> NormRope:
            return NormRope(named(name), config.eps, config.rope)

        self.layer, self.config = layer, config
        self.attn_norm, self.ffn_norm = named("attn_norm"), named("ffn_norm")
        self.attn_q_norm, self.attn_k_norm = norm_rope("attn_q_norm"), norm_rope("attn_k_norm")
        self.attn_q, self.attn_k, self.attn_v = linear("attn_q"), linear("attn_k"), linear("attn_v")
        self.attn_output = linear("attn_output")
        self.ffn_gate, self.ffn_up, self.ffn_down = linear("ffn_gate"), linear("ffn_up"), linear("ffn_down")

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, hidden) to raw K and V: (T, Hkv, D) each. The same for context and block rows."""
        c, T = self.config, x.shape[0]
        k = self.attn_k(x).reshape(T, c.kv_heads, c.head_size)
        return k, self.attn_v(x).reshape(T, c.kv_heads, c.head_size)

    def remembers(self) -> RingSpec:
        c = self.config
        return RingSpec(c.windows[self.layer], c.causal[self.layer], c.rope, c.kv_heads, c.head_size)

    def __call__(self, x: Tensor, batch: RingBatch, ring: Ring) -> Tensor:
        c, T = self.config, x.shape[0]
        h = ops.rms_norm(x, self.attn_norm, c.eps)
        q = self.attn_q(h).reshape(T, c.heads, c.head_size)
        k, v = self.keys_values(h)
        o = ring.attend(q, k, v, self.attn_q_norm, self.attn_k_norm, batch)  # (T, H, D)
        x = x + self.attn_output(o.reshape(T, c.heads * c.head_size))
        h = ops.rms_norm(x, self.ffn_norm, c.eps)
        return x + self.ffn_down(ops.swiglu(self.ffn_gate(h), self.ffn_up(h)))


class DFlash:
    """The draft's two passes. It holds weights only; everything that changes is passed in."""

    def __init__(self, config: DraftConfig, weights: Weights, names: Mapping[str, str]) -> None:
        self.config = config
        self.fc = Linear(weights[names["fc.weight"]])
        self.hidden_norm = weights[names["enc.output_norm.weight"]]
        self.output_norm = weights[names["output_norm.weight"]]
        self.layers = [DraftLayer(weights, names, layer, config) for layer in range(config.layers)]

    def remembers(self) -> tuple[RingSpec, ...]:
        """What each layer keeps of a sequence."""
        return tuple(layer.remembers() for layer in self.layers)

    def inject(self, features: Tensor, positions: Tensor, rows: Sequence[Tensor], rings: Sequence[Ring]) -> None:
        """Write the context K and V of target features, (T, taps * hidden), into every layer's ring (paper, KV
        injection). ``rows``: of each layer's ring, (T,) int32."""
        h = ops.rms_norm(self.fc(features), self.hidden_norm, self.config.eps)  # no input norm on context rows
        for layer, table_rows, ring in zip(self.layers, rows, rings):
            k, v = layer.keys_values(h)
            ring.store(k, v, layer.attn_k_norm, positions, table_rows)

    def propose(self, x: Tensor, batches: Sequence[RingBatch], rings: Sequence[Ring]) -> Tensor:
        """(T, hidden) embeddings of [anchor, MASK, ...] to the hidden rows that the target's head reads."""
        for layer, batch, ring in zip(self.layers, batches, rings):
            x = batch.graph.effect(layer(x, batch, ring))  # ggml walks back recursively, so no further than this
        return ops.rms_norm(x, self.output_norm, self.config.eps)
