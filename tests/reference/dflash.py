"""The DFlash draft in plain numpy, and greedy speculative decoding with it, as arXiv:2602.06036 describes them.

A draft reads the target twice: its tapped hidden states become keys and values of the context ("KV injection"), and its
embedding and LM head serve the block of one known token and masks that is denoised in a single forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .qwen35 import Array, Reference, Weights, attention, rms_norm, rope, swiglu, yarn_or_linear

KV = list[tuple[Array, Array]]  # per layer: k, v (rows, kv_heads, head_dim), k after RoPE


class DraftReference:
    """A draft of architecture `dflash`, or of the fork dialect that names its tensors `dflash.*`.

    `taps` are HF layer ids: tap i means the residual stream after target layer i. `causal` overrides the file for every
    layer; without it and without the key `attention.causal`, sliding layers are causal inside the block and full layers
    are not.
    """

    def __init__(
        self,
        path: Path | str,
        target_path: Path | str,
        dtype: npt.DTypeLike = np.float64,
        causal: bool | None = None,
    ) -> None:
        self.weights = w = Weights(path, dtype)
        target = Weights(target_path, dtype)
        unsupported = [name for name in ("d2t", "markov_w1.weight", "selector_hidden.weight") if name in w]
        if unsupported:
            raise ValueError(f"{path} is no plain DFlash draft: it has {', '.join(unsupported)}")
        # The tensor names tell the dialects apart; architecture names are not reliable.
        self.fork = "dflash.fc.weight" in w
        self.fc = w["dflash.fc.weight" if self.fork else "fc.weight"]
        self.hidden_norm = w["dflash.hidden_norm.weight" if self.fork else "enc.output_norm.weight"]
        self.embedding = w["token_embd.weight"] if "token_embd.weight" in w else target["token_embd.weight"]
        self.output = w.output if "token_embd.weight" in w or "output.weight" in w else target.output
        self.taps, self.block_size, self.mask_token_id = self._header()
        self.layers: int = w.key("block_count")
        self.heads: int = w.key("attention.head_count")
        self.kv_heads: int = w.key("attention.head_count_kv")
        self.head_dim: int = w.key("attention.key_length")
        self.rope_dim: int = w.key("rope.dimension_count", self.head_dim)
        self.theta: float = w.key("rope.freq_base")
        self.rope_scaling = yarn_or_linear(w, self.rope_dim, self.theta)
        self.eps: float = w.key("attention.layer_norm_rms_epsilon")
        window: int = w.key("attention.sliding_window", 0)
        sliding = w.key("attention.sliding_window_pattern", [False] * self.layers) if window else [False] * self.layers
        self.windows: list[int | None] = [window if slides else None for slides in sliding]
        override = causal if causal is not None else w.key("attention.causal")
        self.causal = [bool(slides) if override is None else bool(override) for slides in sliding]

    def _header(self) -> tuple[list[int], int, int]:
        """HF ids of the tapped layers, rows of a block, id of the mask token."""
        w = self.weights
        if self.fork:
            return list(w.key("dflash.target_layer_ids")), w.key("dflash.block_size"), w.key("dflash.mask_token_id")
        # llama.cpp counts the layer whose *input* is tapped.
        taps = [layer - 1 for layer in w.key("target_layers")]
        return taps, w.key("block_size", 16), w.keys["tokenizer.ggml.mask_token_id"]

    def features(self, hidden: dict[int, Array]) -> Array:
        """The target's hidden states of the tapped layers side by side, (rows, taps * hidden), in tap order."""
        return np.concatenate([hidden[tap] for tap in self.taps], axis=-1)

    def context_kv(self, features: Array, first: int = 0) -> KV:
        """Keys and values of context rows at positions `first`, `first` + 1, ...: no input norm, no query, no FFN."""
        h = rms_norm(features @ self.fc.T, self.hidden_norm, self.eps)  # (rows, hidden)
        positions = np.arange(first, first + len(h))
        return [self._kv(h, layer, positions) for layer in range(self.layers)]

    def propose_logits(self, features: Array, anchor_token: int, start: int, rows: int) -> Array:
        """Logits (rows, vocab) of the block [anchor, mask, mask, ...] at positions start..start + rows - 1.

        `features` are those of all positions before the anchor, (start, taps * hidden). Row i >= 1 predicts the token
        at its own position; row 0 predicts nothing.
        """
        if len(features) != start:
            raise ValueError(f"the context has {len(features)} rows, but the anchor stands at position {start}")
        return self.propose_from(self.context_kv(features), anchor_token, start, rows)

    def propose_from(self, context: KV, anchor_token: int, start: int, rows: int) -> Array:
        """`propose_logits` with the context's keys and values already computed."""
        w = self.weights
        positions = np.arange(start, start + rows)
        x = self.embedding[[anchor_token] + [self.mask_token_id] * (rows - 1)]  # (rows, hidden)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            h = rms_norm(x, w[block + "attn_norm.weight"], self.eps)
            q = (h @ w[block + "attn_q.weight"].T).reshape(rows, self.heads, self.head_dim)
            q = self._turned(rms_norm(q, w[block + "attn_q_norm.weight"], self.eps), positions)
            k, v = (np.concatenate(pair) for pair in zip(context[layer], self._kv(h, layer, positions)))
            out = attention(q, k, v, self.visible(layer, start, rows))
            x = x + out.reshape(rows, -1) @ w[block + "attn_output.weight"].T
            norm = "ffn_norm.weight" if block + "ffn_norm.weight" in w else "post_attention_norm.weight"
            x = x + swiglu(rms_norm(x, w[block + norm], self.eps), w, block)
        return rms_norm(x, w["output_norm.weight"], self.eps) @ self.output.T

    def visible(self, layer: int, start: int, rows: int) -> Array:
        """Which keys each block row sees in a layer, (rows, start + rows) bool; key j stands at position j."""
        mask = np.zeros((rows, start + rows), bool)
        for i in range(rows):
            for position in range(start + rows):
                mask[i, position] = self._sees(layer, start + i - position)
        return mask

    def _sees(self, layer: int, distance: int) -> bool:
        """Whether a query sees a key `distance` positions before it (negative: after it)."""
        window = self.windows[layer]
        if self.causal[layer] and distance < 0:
            return False
        return window is None or abs(distance) < window

    def _kv(self, h: Array, layer: int, positions: Array) -> tuple[Array, Array]:
        w, block = self.weights, f"blk.{layer}."
        k = (h @ w[block + "attn_k.weight"].T).reshape(len(h), self.kv_heads, self.head_dim)
        v = (h @ w[block + "attn_v.weight"].T).reshape(len(h), self.kv_heads, self.head_dim)
        k = rms_norm(k, w[block + "attn_k_norm.weight"], self.eps)
        return self._turned(k, positions), v

    def _turned(self, x: Array, positions: Array) -> Array:
        return rope(x, positions, self.rope_dim, self.theta, *self.rope_scaling)


def speculative_reference(
    target: Reference, draft: Any, prompt: Sequence[int], max_tokens: int, block: int
) -> tuple[list[int], list[int]]:
    """Greedy decoding in blocks: the tokens after `prompt` and how many tokens each verify gave (1..block).

    A verify gives its accepted prefix plus the bonus token. The token sampled from the prompt belongs to no verify; the
    last verify counts in full although the tokens are cut at `max_tokens`. `draft` needs `features(hidden)` and
    `propose_logits(features, anchor_token, start, rows)`, so tests may pass scripted ones.
    """
    target.reset()
    anchor = int(np.argmax(target.forward(prompt)[-1]))
    features = draft.features(target.hidden)
    tokens, lengths = [anchor], []
    while len(tokens) < max_tokens:
        start = target.length
        proposal = np.argmax(draft.propose_logits(features, anchor, start, block), axis=-1)
        drafted = [int(token) for token in proposal[1:]]
        before = target.state()
        choices = [int(token) for token in np.argmax(target.forward([anchor, *drafted]), axis=-1)]
        accepted = 0
        while accepted < len(drafted) and choices[accepted] == drafted[accepted]:
            accepted += 1
        # Rejected rows leave no trace: neither in the target's state nor in the draft's context.
        target.load_state(before, start)
        target.forward([anchor, *drafted[:accepted]])
        features = np.concatenate([features, draft.features(target.hidden)])
        anchor = choices[accepted]
        tokens += [*drafted[:accepted], anchor]
        lengths.append(accepted + 1)
    return tokens[:max_tokens], lengths
