"""The same files through llama.cpp of the pinned version: same tokens, same logits, same greedy text.

llama.cpp is not equal to itself: it takes other kernels for other batch widths, and with quantised weights a difference
in the last bit decides now and then whether the 8-bit rounding of an activation goes up or down. Such a flip is worth a
whole level, 1e-4 of the logits' square, in a row and, through the recurrent state, in those after it. Wherever two runs
differ in last bits, flips drive them apart to the same few 1e-4, and there they stay. So our distance from llama.cpp is
compared with that of llama.cpp at width 1 from itself at width 16, on rows where its two widths have had time to part.

Products with K-quants make them part from the first token on, those with Q8_0 and Q4_0 never do. With any weights its
attention does, where flash attention splits the slots of a single query among threads: if it sees 512 or more, which
is from position 256 on, as what it sees is padded to a multiple of 256. The random models have attention in every other
layer, so that recurrent layers come after it and remember.

Both distances are the same noise. The rule is that ours is no larger than llama.cpp's own beyond `ERRORS` standard
errors of their difference, which come from the same texts. It holds for the mean of the rows and for their median,
which a rare row with a hundred times the error does not blur: there the standard error has to be small (`RESOLUTION`).

The oracle that rounds activations as the CPU's products do, and is exact otherwise, is one more run of this kind. We
part from it later than llama.cpp with flash attention does: our first rows have to be closer to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.models import load_model
from pydflash.runtime import Session
from pydflash.text import Tokenizer
from pydflash.text.special_tokens import TokenType
from tests.helpers import Array, RoundedReference, nmse, run_chunks
from tests.parity.peer import peer_kinds, peer_logits, peer_logits_of_many, peer_tokens
from tests.reference.qwen35 import Reference
from tests.shipped import TARGET, TEST_DATA, held_out_prompts, needs_pair
from tests.tiny import GEOMETRIES, K_QUANT_GEOMETRIES, write_target
from tools.synth.layout import target_metadata
from tools.synth.vocabulary import build_vocabulary
from tools.synth.writer import write_gguf

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="the peer is not installed: pip install llama-cpp-python==0.3.36",
    ),
]

FLOAT_NMSE = 1e-6
ERRORS, RESOLUTION = 2, 0.1  # one draw in 44 of equal noise lies further out; RESOLUTION is a share of the distance
EXACT = 2, 32  # texts, and rows of each, that the oracles compute
# llama.cpp aborts on models whose layers are all of one kind, and takes the layer kinds from full_attention_interval
# alone.
FLOAT_GEOMETRIES = [name for name in GEOMETRIES if name not in ("all_attention", "all_recurrent", "listed")]
COUNT = 64


def ours(path: Path, tokens: list[int], width: int, cache: str = "f32") -> Array:
    with load_model(path, "cpu", threads=1) as model, Session(model, 1024, cache, cache) as session:
        return run_chunks(session, tokens, width)


def tokens_for(name: str) -> list[int]:
    tokens: list[int] = np.random.default_rng(6).integers(0, GEOMETRIES[name].vocab, COUNT).tolist()
    return tokens


@pytest.mark.parametrize("types", ["f32", "f16"])
@pytest.mark.parametrize("name", FLOAT_GEOMETRIES)
def test_logits_with_float_weights_are_those_of_llama_cpp(tmp_path: Path, name: str, types: str) -> None:
    path, tokens = write_target(tmp_path / "x.gguf", GEOMETRIES[name], types=types, seed=1), tokens_for(name)
    peer = peer_logits(path, tokens, [1, 16], tmp_path)
    own = nmse(peer[1], peer[16])
    for width, wanted in peer.items():
        error = nmse(ours(path, tokens, width), wanted)
        # f16 weights round activations to f16, whose flips a sensitive geometry amplifies: measured on the peer itself.
        assert error <= max(FLOAT_NMSE, own if types == "f16" else 0), (width, error, own)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 32}
FILES: dict[str, dict[str, Any]] = {
    "linear": {"keys": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    "a factor alone": {"keys": {"rope.scaling.factor": 4.0}},
    "none": {"keys": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}},
    "yarn": {"keys": YARN},
    "yarn of the file's context": {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
    "yarn of a magnitude": {"keys": YARN | {"rope.scaling.attn_factor": 0.75}},
    "biases": {"biases": ("attn_q", "attn_k", "attn_v")},
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", ["gqa6", "odd"])
def test_scaled_positions_and_biases_are_those_of_llama_cpp(tmp_path: Path, name: str, what: str) -> None:
    path, tokens = write_target(tmp_path / "x.gguf", GEOMETRIES[name], seed=1, **FILES[what]), tokens_for(name)
    peer = peer_logits(path, tokens, [16], tmp_path)[16]
    assert nmse(ours(path, tokens, 16), peer) <= FLOAT_NMSE
    plain = write_target(tmp_path / "plain.gguf", GEOMETRIES[name], seed=1)
    assert (nmse(ours(plain, tokens, 16), peer) > 10 * FLOAT_NMSE) == (what != "none")


@dataclass(frozen=True)
class Distances:
    """NMSE of logits: of the judged rows (texts, rows), and of the first rows of a text from the oracles (2, texts).

    ``ours``: from llama.cpp, mean of its widths 1 and 16; ``own``: of these from each other. The oracles are the one
    that rounds activations as the CPU's products do and the one that does not; each has ours and llama.cpp's.
    """

    ours: Array
    own: Array
    rounding: Array
    exact: Array

    @staticmethod
    def joined(several: Sequence[Distances]) -> Distances:
        return Distances(
            *(np.concatenate([getattr(d, name) for d in several]) for name in ("ours", "own")),
            *(np.concatenate([getattr(d, name) for d in several], 1) for name in ("rounding", "exact")),
        )

    def by(self, statistic: Callable[..., Array]) -> tuple[float, float, float]:
        """Ours, llama.cpp's own and the standard error of their difference, of a statistic of each text's rows."""
        ours, own = statistic(self.ours, axis=1), statistic(self.own, axis=1)
        return float(ours.mean()), float(own.mean()), float(np.std(ours - own, ddof=1) / np.sqrt(len(own)))

    def __str__(self) -> str:
        rows = [
            f"{name} {ours:.3e}, its own {own:.3e} +- {error:.1e}"
            for name, (ours, own, error) in [("mean", self.by(np.mean)), ("median", self.by(np.median))]
        ]
        rounding, exact = self.rounding.mean(1), self.exact.mean(1)
        return (
            f"from llama.cpp {'; '.join(rows)}; from the oracle with rounding {rounding[0]:.2e}, llama.cpp "
            f"{rounding[1]:.2e}; without {exact[0]:.3e}, llama.cpp {exact[1]:.3e}"
        )

    def check(self) -> None:
        for statistic in (np.mean, np.median):
            ours, own, error = self.by(statistic)
            assert ours <= own + ERRORS * error, self
        _, own, error = self.by(np.median)
        assert ERRORS * error <= RESOLUTION * own, self


def nmse_by_row(got: Array, wanted: Array) -> Array:
    """NMSE (texts, rows) of logits (texts, rows, vocab)."""
    errors: Array = np.mean((got - wanted) ** 2, -1) / np.mean(wanted**2, -1)
    return errors


@dataclass(frozen=True)
class Texts:
    """How many texts, of how many tokens; where llama.cpp's widths begin to part; how many last rows are judged."""

    count: int
    length: int
    parting: int
    judged: int


# Attention takes 128 rows to part them: until then they are closer to each other than either is to us.
RANDOM = Texts(4, 512, parting=320, judged=64)
SHIPPED = Texts(20, 192, parting=0, judged=128)


def distances(
    path: Path,
    texts: Sequence[Sequence[int]],
    folder: Path,
    plan: Texts,
    oracles: Sequence[type[Reference]] = (RoundedReference, Reference),
) -> Distances:
    split = plan.parting > 0
    peer = peer_logits_of_many(path, texts, [1, 16], folder, start=plan.parting, flash=split, threads=2 if split else 1)
    rows = []
    with load_model(path, "cpu", threads=1) as model:
        for text in texts:
            with Session(model, plan.length, "f32", "f32") as session:
                rows.append(run_chunks(session, text, 16))
        with Session(model, plan.length, "f32", "f32") as session:  # one width stands for all
            assert np.array_equal(run_chunks(session, texts[0][:64], 1), rows[0][:64])
    engines = [np.stack(rows).astype(np.float64), peer[1].astype(np.float64), peer[16].astype(np.float64)]
    ours, single, wide = (logits[:, -plan.judged :] for logits in engines)
    count, first = EXACT
    exact = []
    for oracle in oracles:
        logits = np.stack([oracle(path).forward(text[:first]) for text in texts[:count]])
        exact.append(np.stack([nmse_by_row(e[:count, :first], logits).mean(1) for e in engines[::2]]))
    between = (nmse_by_row(ours, single) + nmse_by_row(ours, wide)) / 2
    return Distances(between, nmse_by_row(wide, single), *exact)


@pytest.mark.parametrize("types", ["q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_quantised_logits_are_no_further_from_llama_cpp_than_it_is_from_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], types: str
) -> None:
    found = []
    for name in K_QUANT_GEOMETRIES:
        geometry = replace(GEOMETRIES[name], interval=2)
        path = write_target(tmp_path / "x.gguf", geometry, types=types, seed=1)
        texts = np.random.default_rng(6).integers(0, geometry.vocab, (RANDOM.count, RANDOM.length)).tolist()
        found.append(distances(path, texts, tmp_path, RANDOM))
    joined = Distances.joined(found)
    with capsys.disabled():
        print(f"\n{types}: {joined}")
    joined.check()
    assert joined.rounding[0].mean() <= joined.rounding[1].mean(), joined


def tokenizer_agrees(path: Path, folder: Path, normalise: Callable[[Path], Tokenizer]) -> None:
    texts = (TEST_DATA / "multilingual.txt").read_text(encoding="utf-8").splitlines()
    assert len(texts) >= 200
    tokenizer = normalise(path)
    for special in (True, False):
        wanted = peer_tokens(path, texts, folder, special)
        for text, ids in zip(texts, wanted):
            assert tokenizer.encode(text, special=special) == ids, text


def as_llama_cpp_has_it(path: Path) -> Tokenizer:
    """Without the NFC normalisation of the model's own tokenizer, which llama.cpp leaves out."""
    with load_model(path, "cpu", threads=1) as model:
        return Tokenizer.from_metadata(model.file.metadata, normalize=False)


def test_a_small_vocabulary_gives_the_tokens_of_llama_cpp(tmp_path: Path) -> None:
    path = write_target(tmp_path / "x.gguf", GEOMETRIES["gqa6"])
    tokenizer_agrees(path, tmp_path, as_llama_cpp_has_it)


VOCABULARIES = {
    "qwen": [
        "<|im_end|>",
        "<|endoftext|>",
        "<|fim_prefix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<think>",
    ],
    "harmony": ["<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"],
    "solar": ["<|end|>", "<|calls|>", "<|flush|>", "<|im_start|>"],
    "html": ["</s>", "<eos>", "<|tool_response>", "<turn|>", "[PAD]", "[EOS]", "[EOT]"],
    "others": ["</s>", "<|end|>", "<|return|>", "_<EOT>", "<|suffix|>", "<MID>", "<|eom_id|>", "[e~[", "<end_of_turn>"],
}


def test_tokens_are_of_the_kinds_that_llama_cpp_finds(tmp_path: Path) -> None:
    """Whatever type the file gives to tokens that llama.cpp knows by their texts, and whatever roles it names."""
    files = []
    for name, texts in VOCABULARIES.items():
        for kind in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNKNOWN):
            vocabulary = build_vocabulary(320)
            metadata = target_metadata(GEOMETRIES["equal"], vocabulary, name)
            first = vocabulary.tokens.index("<|endoftext|>")
            vocabulary.tokens[first : first + len(texts)] = texts
            vocabulary.types[first : first + len(texts)] = [int(kind)] * len(texts)
            roles = {"eos": 40, "eom": 41, "fim_pad": 42} if kind is TokenType.UNKNOWN else {"eos": first}
            metadata |= {f"tokenizer.ggml.{role}_token_id": token for role, token in roles.items()}
            path = tmp_path / f"{name}-{kind}.gguf"
            write_gguf(path, metadata, [])
            files.append((path, Tokenizer.from_metadata(metadata)))
    found = peer_kinds([path for path, _ in files], tmp_path)
    for (path, tokenizer), (control, user_defined, ends) in zip(files, found):
        assert tokenizer.control_ids == control, path.name
        assert set(tokenizer.added.ids.values()) == control | user_defined, path.name
        assert tokenizer.eos_ids == ends, path.name


@needs_pair
def test_the_shipped_vocabulary_gives_the_tokens_of_llama_cpp(tmp_path: Path) -> None:
    tokenizer_agrees(TARGET, tmp_path, as_llama_cpp_has_it)


@needs_pair
def test_the_shipped_model_continues_as_llama_cpp_does_over_256_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our greedy text is read by llama.cpp, which must choose every token of it, near-ties apart.

    A near-tie is a choice whose two candidates lie closer together than llama.cpp's logits at widths 1 and 16 do.
    """
    with load_model(TARGET, "cpu", threads=1) as model, Session(model, 1024, "f32", "f32") as session:
        prompt = model.tokenizer.encode(held_out_prompts(1)[0])
        text = list(prompt)
        choice = int(run_chunks(session, prompt, 16)[-1].argmax())
        for _ in range(256):
            text.append(choice)
            choice = int(session.forward([choice]).argmax[0])
            session.commit(1)
        spell = model.tokenizer.decode
        peer = peer_logits(TARGET, text, [1, 16], tmp_path)
        spread = float(np.abs(peer[1] - peer[16]).max())
        near_ties = []
        for i in range(len(prompt), len(text)):
            row = peer[1][i - 1]
            best = int(row.argmax())
            gap = float(row[best] - row[text[i]])
            if best != text[i]:
                near_ties.append(
                    f"token {i - len(prompt)}: {spell([text[i]])!r} here, {spell([best])!r} there, {gap:.2g}"
                )
                assert gap <= 2 * spread, near_ties
    with capsys.disabled():
        print(f"\nnear-ties with llama.cpp over 256 tokens (its own spread is {spread:.2g}): {near_ties or 'none'}")
    assert len(near_ties) <= 8


@needs_pair
def test_the_shipped_model_is_no_further_from_llama_cpp_than_it_is_from_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = np.array(held_out_prompts(200)).reshape(-1, 5)[: SHIPPED.count]
    with load_model(TARGET, "cpu", threads=1) as model:
        texts = [model.tokenizer.encode("\n\n".join(several))[: SHIPPED.length] for several in prompts]
    assert all(len(text) == SHIPPED.length for text in texts)
    found = distances(TARGET, texts, tmp_path, SHIPPED)
    with capsys.disabled():
        print(f"\nshipped: {found}")
    found.check()
