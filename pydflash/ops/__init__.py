"""The operations of the models, under the names their papers use. Shapes are checked here, before ggml sees them.

T is the number of rows (tokens) of a step, H query heads, Hkv key/value heads, D a head's size, C hidden or channel
columns. A step of at most ``EXACT_ROWS`` rows takes the kernels whose rows do not depend on one another (D8 in
docs/architecture.md); wider steps (prefill) take ggml's faster ones. A header in parentheses is the contract of our own
node, in the folder of ``ggml_ext/`` that has the module's name.
"""

from pydflash.ops.attention import attention, attention_prefill
from pydflash.ops.delta import delta_inputs, delta_rule
from pydflash.ops.experts import experts, mix_experts
from pydflash.ops.heads import NormRope, Rope, norm_rope, rope, store_kv, turbo_wht
from pydflash.ops.largest import argmax, top_k
from pydflash.ops.linear import linear
from pydflash.ops.norms import gated_rms_norm, rms_norm, sigmoid, sigmoid_gate, silu, swiglu
from pydflash.ops.rows import copy_into, get_rows, set_rows

__all__ = [
    "NormRope",
    "Rope",
    "argmax",
    "attention",
    "attention_prefill",
    "copy_into",
    "delta_inputs",
    "delta_rule",
    "experts",
    "gated_rms_norm",
    "get_rows",
    "linear",
    "mix_experts",
    "norm_rope",
    "rms_norm",
    "rope",
    "set_rows",
    "sigmoid",
    "sigmoid_gate",
    "silu",
    "store_kv",
    "swiglu",
    "top_k",
    "turbo_wht",
]
