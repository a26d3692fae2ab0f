"""Every tensor and every key of the architecture in a GGUF file is read, known to change nothing, or refused by name.

Keys count as read when :meth:`GGUFFile.get` or :meth:`GGUFFile.require` gave their value away, tensors when they are
among those that are loaded. What follows is the rest: what llama.cpp's converter, Ollama's and others write besides.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np

from pydflash.files import GGUFFile, check_patterns, matcher, refuse_unread
from pydflash.ggml_types import GGMLType

__all__ = ["account", "mtp_blocks"]

_SIDECARS = matcher(("v.*", "mm.*", "mtp.*"))
"""Tensors of other networks in the same file: an image encoder, its projector, multi-token prediction."""

_FREQUENCIES = matcher(("rope_freqs.weight", "blk.*.rope_freqs.weight"))

_HARMLESS = matcher(
    (
        "context_length", "tensor_data_layout",
        "vision.*", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
        "n_deepstack_layers", "deepstack_mapping", "mtp.*", "mtp_*", "nextn*",
        "mrope_sections", "rope.mrope_section",  # Ollama repeats rope.dimension_sections
        "rope.mrope_interleaved",  # text has one position, however sections are laid out
        "rope.scaling.finetuned",
        "rope.scaling.factor",  # beside the type none; the others read it
        "rope.scaling.original_context_length", "rope.scaling.yarn_*",  # of YaRN, beside another type
        "attention.layer_norm_epsilon",  # of layers with a mean; all here are root-mean-square norms
        "dflash.n_target_layers", "dflash.n_target_features",  # fc.weight has as many columns
    )
)  # fmt: skip
"""Keys, without the architecture, that change nothing in the forward pass of text."""

_NEUTRAL: Mapping[str, tuple[bool | float | str, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attention.value_scale": (1,),
    "attn_logit_softcapping": (0,),
    "dflash.context_kv_layer_norm": (False,),
    "dflash.dspark.enabled": (False,),
    "embedding_scale": (1,),
    "expert_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (1,),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "final_logit_softcapping": (0,),
    "has_confidence_head": (False,),
    "hidden_activation": ("silu",),
    "leading_dense_block_count": (0,),
    "logit_scale": (1,),
    "norm_top_k_prob": (True,),
    "pooling_type": (0,),
    "residual_scale": (1,),
    "sample_from_anchor": (False,),
    "use_parallel_residual": (False,),
}
"""Keys that change nothing when they have one of these values."""

_MEANINGS = (
    ("*.bias", "a bias"),
    ("*scale", "the factor of a quantised matrix"),
    ("*attn_sinks*", "attention sinks"),
    ("*rope_freqs.weight", "RoPE frequency factors that are not all 1"),
    ("*_conv_*", "a convolution of DFlash2"),
    ("selector_*", "the candidate selector of DFlash2"),
    ("markov_*", "the Markov head of DSpark"),
    ("conf_proj.*", "the confidence head of DSpark"),
    ("d2t", "a reduced draft vocabulary"),
    ("token_embd.weight", "an embedding of the draft's own, where the target's is taken"),
    ("output.weight", "a head of the draft's own, where the target's is taken"),
    ("adapter.*", "a LoRA adapter"),
)


def account(
    file: GGUFFile, architecture: str, used: Container[str], layers: int, ignore: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """The names of unused tensors and keys that ``ignore`` lets pass; patterns as in a shell.

    ``used``: names of the tensors that are loaded. ``layers``: blocks that are run; those of multi-token prediction
    after them are harmless. Raises UnsupportedModel for the first name that is neither used, harmless nor let pass, and
    ConfigError for a pattern that matches nothing in the file.
    """
    patterns = check_patterns(ignore, file.path, (*file.tensors, *file.metadata))
    unread = (*_tensors(file, used, layers), *_keys(file, f"{architecture}."))
    return refuse_unread(file.path, architecture, unread, patterns, lambda name: _described(file, name))


def mtp_blocks(file: GGUFFile) -> frozenset[int]:
    """Blocks of multi-token prediction, which are those with tensors ``blk.N.nextn.*``."""
    found = (re.match(r"blk\.(\d{1,6})\.nextn\.", name) for name in file.tensors)
    return frozenset(int(match[1]) for match in found if match)


def _tensors(file: GGUFFile, used: Container[str], layers: int) -> Iterator[str]:
    blocks = tuple(f"blk.{block}." for block in mtp_blocks(file) if block >= layers)
    for name in file.tensors:
        harmless = _SIDECARS(name) or name.startswith(blocks) or (_FREQUENCIES(name) and _is_one(file, name))
        if name not in used and not harmless:
            yield name


def _is_one(file: GGUFFile, name: str) -> bool:
    """Whether all values of a tensor are 1, for one of no more values than a head can have."""
    info = file.tensors[name]
    return info.type == GGMLType.F32 and info.elements < 1 << 16 and bool(np.all(file.data(name).view("<f4") == 1))


def _keys(file: GGUFFile, prefix: str) -> Iterator[str]:
    for key in file.metadata:
        if key.startswith(prefix):
            harmless = _HARMLESS(key.removeprefix(prefix)) or _is_in(file, key, _NEUTRAL.get(key.removeprefix(prefix)))
        else:
            harmless = not key.startswith("adapter.") and (key != "general.type" or _is_in(file, key, ("model",)))
        if key not in file.keys_read and not harmless:
            yield key


def _is_in(file: GGUFFile, key: str, values: tuple[bool | float | str, ...] | None) -> bool:
    value = file.metadata[key] if values and file.metadata.count(key) is None else None
    return value is not None and value in (values or ())


def _described(file: GGUFFile, name: str) -> str:
    """A tensor or a key, its value, and what it stands for where that is known."""
    meaning = next((f", {text}," for pattern, text in _MEANINGS if matcher([pattern])(name)), "")
    if name in file.tensors:
        return f"tensor {name!r}{meaning}"
    count = file.metadata.count(name)
    value = f"{file.metadata[name]!r:.40}" if count is None else f"a list of {count:,}"
    return f"metadata key {name!r} ({value}){meaning}"
