"""The numpy oracle of `qwen35moe` computes what llama.cpp of the pinned version computes from the same file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import nmse
from tests.parity.peer import peer_logits
from tests.reference.qwen35moe import MoEReference
from tests.tiny import MOE_GEOMETRIES, write_target

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="the peer is not installed: pip install llama-cpp-python==0.3.36",
    ),
]

COUNT = 48
# llama.cpp computes in float32, the oracle in double precision: 1e-12 was seen. A wrong expert is worth 1e-2 or more.
FLOAT_NMSE = 1e-9


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_the_oracle_s_logits_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    geometry = MOE_GEOMETRIES[name]
    path = write_target(tmp_path / "x.gguf", geometry, seed=1)
    tokens = np.random.default_rng(6).integers(0, geometry.vocab, COUNT).tolist()
    wanted = MoEReference(path).forward(tokens)
    for width, logits in peer_logits(path, tokens, [1, 16], tmp_path).items():
        assert nmse(logits, wanted) < FLOAT_NMSE, width
