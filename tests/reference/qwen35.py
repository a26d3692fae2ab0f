"""The `qwen35` architecture in plain numpy: gated delta-net layers with a full-attention layer every few.

Written from the model's mathematics, loops and all; nothing here is fast. Tensor names are the GGUF names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = Callable[[Array], Array]  # maps (rows, kv_heads, head_dim) to the same shape


class Weights:
    """All tensors of a GGUF file, dequantised to `dtype`, and its metadata. `weights["name"]` is row-major."""

    def __init__(self, path: Path | str, dtype: npt.DTypeLike) -> None:
        reader = gguf.GGUFReader(str(path))
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.arch: str = self.keys["general.architecture"]
        self._tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(dtype) for t in reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]

    def key(self, name: str, default: Any = None) -> Any:
        """The value of metadata key `{architecture}.{name}`."""
        return self.keys.get(f"{self.arch}.{name}", default)

    @property
    def output(self) -> Array:
        """The LM head (vocab, hidden): `output.weight`, or the token embeddings of a tied model."""
        return self["output.weight" if "output.weight" in self else "token_embd.weight"]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def l2_norm(x: Array, eps: float) -> Array:
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps)


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    return np.logaddexp(x, np.zeros_like(x))


def softmax(x: Array) -> Array:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def yarn_or_linear(weights: Weights, dims: int, theta: float) -> tuple[Array, float]:
    """What a file's `rope.scaling.*` make of the plain frequencies, pair by pair: factors (dims / 2,), and the factor
    of cosines and sines. As Hugging Face's `_compute_yarn_parameters` has it, in double precision."""

    def key(name: str, default: Any = None) -> Any:
        return weights.key(f"rope.scaling.{name}", default)

    kind = key("type", "linear")
    factor = key("factor", weights.key("rope.scale_linear", 1.0)) if kind != "none" else 1.0
    if kind != "yarn":
        return np.full(dims // 2, 1 / factor), key("attn_factor", 1.0)
    trained = key("original_context_length", weights.key("context_length"))

    def correction_dim(rotations: float) -> Any:
        return dims * np.log(trained / (rotations * 2 * np.pi)) / (2 * np.log(theta))

    low = max(np.floor(correction_dim(key("yarn_beta_fast", 32.0))), 0)
    high = min(np.ceil(correction_dim(key("yarn_beta_slow", 1.0))), dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    magnitude = key("yarn_attn_factor", 0.1 * np.log(factor) + 1.0) * key("attn_factor", 1.0)
    return ramp / factor + (1 - ramp), magnitude


def rope(
    x: Array, positions: Array, dims: int, theta: float, scaling: Array | float = 1.0, magnitude: float = 1.0
) -> Array:
    """Rotate the first `dims` values of every head of x (rows, heads, head_dim), pairing i with i + dims / 2 (NeoX).

    M-RoPE with equal positions on all axes, which is what text has, is the same rotation. Frequencies and angles are
    rounded to float32 whatever x is, as the models' implementation rounds them: far positions turn by something else in
    double precision. `scaling` (dims / 2) multiplies frequencies, `magnitude` what was rotated.
    """
    half = dims // 2
    frequency = (float(theta) ** (-np.arange(half) / half)).astype(np.float32)
    frequency = (frequency * np.asarray(scaling, np.float64)).astype(np.float32)
    angle = (np.asarray(positions, np.float32)[:, None] * frequency).astype(np.float64)  # (rows, half)
    cos, sin = ((magnitude * turn(angle))[:, None].astype(x.dtype) for turn in (np.cos, np.sin))
    first, second, rest = x[..., :half], x[..., half:dims], x[..., dims:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)


def attention(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, query head h reading KV head h // (heads / kv_heads).

    q (rows, heads, head_dim); k, v (keys, kv_heads, head_dim); visible (rows, keys) bool; returns q's shape.
    """
    heads, head_dim = q.shape[1:]
    group = heads // k.shape[1]
    out = np.empty_like(q)
    for h in range(heads):
        scores = q[:, h] @ k[:, h // group].T / np.sqrt(q.dtype.type(head_dim))  # (rows, keys)
        out[:, h] = softmax(np.where(visible, scores, -np.inf)) @ v[:, h // group]
    return out


def swiglu(x: Array, weights: Weights, block: str, suffix: str = "") -> Array:
    gate, up = (x @ weights[f"{block}ffn_{name}{suffix}.weight"].T for name in ("gate", "up"))
    return (silu(gate) * up) @ weights[f"{block}ffn_down{suffix}.weight"].T


def round_trip(name: str) -> Rows:
    """What a cache of type `name` ("f16", "q8_0", "q4_0", ...) gives back for the rows it was given."""
    kind = gguf.GGMLQuantizationType[name.upper()]

    def through(rows: Array) -> Array:
        stored = gguf.quantize(np.ascontiguousarray(rows, np.float32), kind)
        return gguf.dequantize(stored, kind).reshape(rows.shape).astype(rows.dtype)

    return through


class Reference:
    """A model of `architecture` with one sequence's state.

    `cache_k` and `cache_v` map the rows of K (after RoPE) and V as they enter the cache, to model lossy caches.
    `hidden[layer]` holds the residual stream (rows, hidden) after each layer of the last forward.
    """

    architecture = "qwen35"

    def __init__(
        self,
        path: Path | str,
        dtype: npt.DTypeLike = np.float64,
        cache_k: Rows | None = None,
        cache_v: Rows | None = None,
    ) -> None:
        self.weights = weights = Weights(path, dtype)
        if weights.arch != self.architecture:
            raise ValueError(f"{path} holds architecture {weights.arch!r}, not {self.architecture!r}")
        self.dtype = np.dtype(dtype)
        self._cache_k, self._cache_v = cache_k or (lambda rows: rows), cache_v or (lambda rows: rows)
        self.layers: int = weights.key("block_count") - weights.key("nextn_predict_layers", 0)  # MTP blocks come last
        self.heads: int = weights.key("attention.head_count")
        self.kv_heads: int = weights.key("attention.head_count_kv")
        self.head_dim: int = weights.key("attention.key_length")
        self.rope_dim: int = weights.key("rope.dimension_count", self.head_dim)
        self.theta: float = weights.key("rope.freq_base")
        self.rope_scaling = yarn_or_linear(weights, self.rope_dim, self.theta)
        self.eps: float = weights.key("attention.layer_norm_rms_epsilon")
        self.k_heads: int = weights.key("ssm.group_count")
        self.v_heads: int = weights.key("ssm.time_step_rank")
        self.state_dim: int = weights.key("ssm.state_size")
        self.conv: int = weights.key("ssm.conv_kernel")
        interval = weights.key("full_attention_interval", 4)
        listed = weights.key("attention.recurrent_layers")
        self.recurrent = [bool(listed[i]) if listed else (i + 1) % interval != 0 for i in range(self.layers)]
        self.hidden: dict[int, Array] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        channels = (2 * self.k_heads + self.v_heads) * self.state_dim
        self.length = 0
        self._state: list[dict[str, Array]] = []
        for recurrent in self.recurrent:
            if recurrent:
                conv = np.zeros((self.conv - 1, channels), self.dtype)
                delta = np.zeros((self.v_heads, self.state_dim, self.state_dim), self.dtype)
                self._state.append({"conv": conv, "delta": delta})
            else:
                empty = np.zeros((0, self.kv_heads, self.head_dim), self.dtype)
                self._state.append({"k": empty, "v": empty})

    def state(self) -> list[dict[str, Array]]:
        """Copies of each layer's state.

        Delta-net layers: `conv` (conv - 1, channels), oldest first, before the convolution; `delta` (v_heads, state,
        state), indexed [head, key, value]. Attention layers: `k`, `v` (length, kv_heads, head_dim) as cached.
        """
        return [{name: array.copy() for name, array in layer.items()} for layer in self._state]

    def load_state(self, state: list[dict[str, Array]], length: int) -> None:
        """Continue from what `state()` returned when `length` tokens had been seen."""
        self._state = [{name: array.copy() for name, array in layer.items()} for layer in state]
        self.length = length

    def forward(self, tokens: Sequence[int]) -> Array:
        """Append `tokens` and return the logits (rows, vocab) after each of them."""
        w = self.weights
        positions = np.arange(self.length, self.length + len(tokens))
        x = w["token_embd.weight"][np.asarray(tokens)]  # (rows, hidden)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            mixer = self._delta_net if self.recurrent[layer] else self._attention
            x = x + mixer(rms_norm(x, w[block + "attn_norm.weight"], self.eps), layer, positions)
            x = x + self._feed_forward(rms_norm(x, w[block + "post_attention_norm.weight"], self.eps), block)
            self.hidden[layer] = x
        self.length += len(tokens)
        return rms_norm(x, w["output_norm.weight"], self.eps) @ w.output.T

    def _feed_forward(self, x: Array, block: str) -> Array:
        return swiglu(x, self.weights, block)

    def _projected(self, x: Array, name: str) -> Array:
        """x W^T, plus a bias where the file has one."""
        y: Array = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _attention(self, x: Array, layer: int, positions: Array) -> Array:
        w, block, rows, d = self.weights, f"blk.{layer}.", len(x), self.head_dim
        turn = (positions, self.rope_dim, self.theta, *self.rope_scaling)
        # Each head's rows of attn_q are its query followed by its gate.
        q_and_gate = self._projected(x, block + "attn_q").reshape(rows, self.heads, 2 * d)
        q, gate = q_and_gate[..., :d], q_and_gate[..., d:]
        k = self._projected(x, block + "attn_k").reshape(rows, self.kv_heads, d)
        v = self._projected(x, block + "attn_v").reshape(rows, self.kv_heads, d)
        q = rope(rms_norm(q, w[block + "attn_q_norm.weight"], self.eps), *turn)
        k = rope(rms_norm(k, w[block + "attn_k_norm.weight"], self.eps), *turn)
        cache = self._state[layer]
        cache["k"] = np.concatenate([cache["k"], self._cache_k(k)])
        cache["v"] = np.concatenate([cache["v"], self._cache_v(v)])
        visible = np.arange(len(cache["k"])) <= positions[:, None]
        out = attention(q, cache["k"], cache["v"], visible) * sigmoid(gate)
        return out.reshape(rows, -1) @ w[block + "attn_output.weight"].T

    def _delta_net(self, x: Array, layer: int, positions: Array) -> Array:
        w, block, rows, n = self.weights, f"blk.{layer}.", len(x), self.state_dim
        state = self._state[layer]
        columns = np.concatenate([state["conv"], x @ w[block + "attn_qkv.weight"].T])  # (conv - 1 + rows, channels)
        state["conv"] = columns[rows:]
        kernel = w[block + "ssm_conv1d.weight"]  # (channels, conv), the newest column last
        mixed = silu(np.stack([np.sum(columns[t : t + self.conv] * kernel.T, axis=0) for t in range(rows)]))
        q, k, v = np.split(mixed, [self.k_heads * n, 2 * self.k_heads * n], axis=1)
        q = l2_norm(q.reshape(rows, self.k_heads, n), self.eps) / np.sqrt(self.dtype.type(n))
        k = l2_norm(k.reshape(rows, self.k_heads, n), self.eps)
        v = v.reshape(rows, self.v_heads, n)
        beta = sigmoid(x @ w[block + "ssm_beta.weight"].T)  # (rows, v_heads)
        # ssm_a holds -exp(A_log), so g <= 0 is the logarithm of the decay.
        g = softplus(x @ w[block + "ssm_alpha.weight"].T + w[block + "ssm_dt.bias"]) * w[block + "ssm_a"]
        o = np.empty_like(v)
        for t in range(rows):
            for h in range(self.v_heads):
                group = h % self.k_heads  # GGUF files store the V heads tiled over the K heads
                o[t, h] = delta_rule(state["delta"][h], q[t, group], k[t, group], v[t, h], beta[t, h], g[t, h])
        z = (x @ w[block + "attn_gate.weight"].T).reshape(rows, self.v_heads, n)
        gated = rms_norm(o, w[block + "ssm_norm.weight"], self.eps) * silu(z)
        return gated.reshape(rows, -1) @ w[block + "ssm_out.weight"].T


def delta_rule(S: Array, q: Array, k: Array, v: Array, beta: Any, g: Any) -> Array:
    """One token of the gated delta rule on the state S (key, value) of one head, updated in place; returns S^T q."""
    S *= np.exp(g)
    S += np.outer(k, beta * (v - S.T @ k))
    return S.T @ q


def greedy(target: Reference, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The `max_tokens` most likely tokens after `prompt`, one at a time; the lower id wins a tie."""
    target.reset()
    tokens = [int(np.argmax(target.forward(prompt)[-1]))]
    while len(tokens) < max_tokens:
        tokens.append(int(np.argmax(target.forward(tokens[-1:])[-1])))
    return tokens
