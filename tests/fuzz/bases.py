"""The good files that drivers change: the smallest that there can be of each kind, written once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from pydflash.drafts import DraftSession, load_draft
from pydflash.files import GGUFFile
from pydflash.models import load_model
from pydflash.runtime import Session
from tests.tiny import Geometry, write_draft, write_target
from tools.synth.layout import Experts

__all__ = ["TEXT", "write_bases"]

TARGET = Geometry(64, 2, 2, 2, 1, 64, 16, 2, 2, 32, 4, 64, 320)
EXPERTS = Geometry(64, 2, 2, 2, 1, 64, 16, 2, 2, 32, 4, 0, 320, experts=Experts(4, 2, 64, 64))
TEXT = list(range(3, 25))
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
TOP = {"fc": "fc", "enc.output_norm": "hidden_norm", "output_norm": "norm"}


def write_bases(folder: Path) -> Path:
    """target.gguf, experts.gguf, draft.gguf, fork.gguf, target.snapshot, draft.snapshot and the draft's Hugging Face
    files in hf/."""
    folder.mkdir(parents=True, exist_ok=True)
    write_target(folder / "target.gguf", TARGET, types="q8_0", seed=1)
    write_target(folder / "experts.gguf", EXPERTS, types="q8_0", seed=1)
    draft = {"layers": 2, "window": 16, "heads": 2, "kv_heads": 1, "ffn": 64, "block_size": 8, "taps": (0,)}
    write_draft(folder / "draft.gguf", TARGET, **draft)  # type: ignore[arg-type]
    write_draft(folder / "fork.gguf", TARGET, **draft, layout="fork")  # type: ignore[arg-type]
    _write_snapshots(folder)
    _write_hf(folder)
    return folder


def _write_snapshots(folder: Path) -> None:
    with (
        load_model(folder / "target.gguf", "cpu", threads=1) as model,
        load_draft(folder / "draft.gguf", model) as draft,
        Session(model, 64, capture=draft.taps) as session,
        DraftSession(draft, session) as proposer,  # type: ignore[arg-type]
    ):
        for output in session.prefill(TEXT):
            proposer.commit(output.count)
        session.snapshot().save(folder / "target.snapshot")
        proposer.snapshot().save(folder / "draft.snapshot")


def _write_hf(folder: Path) -> None:
    (folder / "hf").mkdir(exist_ok=True)
    with GGUFFile.open(folder / "draft.gguf") as file:
        tensors: dict[str, npt.NDArray[np.float32]] = {
            _hf_name(name): file.data(name).view(np.float32).reshape(info.shape) for name, info in file.tensors.items()
        }
        config = {
            "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 64, "rms_norm_eps": 1e-6,
            "rope_theta": 1e7, "rope_parameters": None, "max_position_embeddings": 4096, "block_size": 8,
            "vocab_size": TARGET.vocab, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
            "is_causal": None,
            "dflash_config": {
                "mask_token_id": int(file.metadata["tokenizer.ggml.mask_token_id"]), "target_layer_ids": [0],
            },
        }  # fmt: skip
        save_file(tensors, folder / "hf" / "model.safetensors")
    (folder / "hf" / "config.json").write_text(json.dumps(config))


def _hf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, layer, tensor = stem.split(".")
    return f"layers.{layer}.{LAYER[tensor]}.weight"
