"""What llama.cpp says about a file, computed in a process of its own.

Both packages bring libraries called libggml-base.so; in one process the loader would give the second one the first
one's. Usage: ``python -m tests.parity.peer REQUEST.json RESULT.npz``. The request holds ``path`` and either ``texts``
to tokenize, or ``sequences`` of tokens of one length to evaluate at each of ``widths``; or it holds ``vocabularies``,
paths of files whose tokens' kinds are wanted. Threads that wait for each
other soon sleep: where other processes want the processor, a spinning one keeps it from the one it waits for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KINDS = ("control", "user_defined", "end")
ROOT = Path(__file__).parents[2]


def peer_logits(
    path: Path, tokens: Sequence[int], widths: Sequence[int], folder: Path, cache: str = "f32"
) -> dict[int, npt.NDArray[np.float32]]:
    """Logits (len(tokens), vocab) by the number of rows that llama.cpp evaluates at once."""
    return {width: rows[0] for width, rows in peer_logits_of_many(path, [tokens], widths, folder, cache).items()}


def peer_logits_of_many(
    path: Path,
    sequences: Sequence[Sequence[int]],
    widths: Sequence[int],
    folder: Path,
    cache: str = "f32",
    *,
    start: int = 0,
    flash: bool = False,
    threads: int = 1,
) -> dict[int, npt.NDArray[np.float32]]:
    """Logits (S, T, vocab) of S sequences of T tokens each, evaluated on their own.

    The first ``start`` tokens are read at the largest of ``widths`` whatever the width. ``flash``: attention is one
    operation, which splits the slots of a single query among ``threads`` where it sees 512 or more.
    """
    wanted = [list(map(int, tokens)) for tokens in sequences]
    how = {"widths": list(widths), "cache": cache, "start": start, "flash": flash, "threads": threads}
    arrays = _ask({"path": str(path), "sequences": wanted, **how}, folder)
    return {width: arrays[f"width_{width}"] for width in widths}


def peer_tokens(path: Path, texts: Sequence[str], folder: Path, special: bool) -> list[list[int]]:
    """The token ids of each text, without a BOS."""
    arrays = _ask({"path": str(path), "texts": list(texts), "special": special}, folder)
    return [arrays[f"text_{i}"].tolist() for i in range(len(texts))]


def peer_kinds(paths: Sequence[Path], folder: Path) -> list[tuple[set[int], set[int], set[int]]]:
    """Of each file the ids of the control tokens, of the user-defined ones, and of those that end a generation."""
    arrays = _ask({"vocabularies": [str(path) for path in paths]}, folder)
    return [tuple(set(arrays[f"{kind}_{i}"].tolist()) for kind in KINDS) for i in range(len(paths))]  # type: ignore[misc]


def _ask(request: dict[str, Any], folder: Path) -> dict[str, npt.NDArray[Any]]:
    question, answer = folder / "request.json", folder / "result.npz"
    question.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "tests.parity.peer", str(question), str(answer)]
    environment = {**os.environ, "GOMP_SPINCOUNT": "2000"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed on {request.get('path', 'a vocabulary')}:\n{done.stderr[-2000:]}")
    with np.load(answer) as arrays:
        return dict(arrays)


def _answer(request: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    import llama_cpp

    if "texts" in request:
        model = llama_cpp.Llama(request["path"], vocab_only=True, verbose=False)
        texts = [t.encode() for t in request["texts"]]
        ids = [model.tokenize(t, add_bos=False, special=request["special"]) for t in texts]
        return {f"text_{i}": np.array(row, np.int32) for i, row in enumerate(ids)}
    if "vocabularies" in request:
        models = [llama_cpp.Llama(path, vocab_only=True, verbose=False) for path in request["vocabularies"]]
        return {f"{kind}_{i}": ids for i, model in enumerate(models) for kind, ids in zip(KINDS, _kinds(model))}
    llama_cpp.llama_cpp.llama_model_default_params = _in_file_order(llama_cpp.llama_model_default_params)
    sequences, widths, start = request["sequences"], request["widths"], request["start"]
    context, threads = -(-len(sequences[0]) // 256) * 256, request["threads"]
    cache = {"f32": 0, "f16": 1}[request["cache"]]
    model = llama_cpp.Llama(
        request["path"], n_ctx=context, n_batch=max(widths), n_ubatch=max(widths), n_threads=threads,
        n_threads_batch=threads, logits_all=True, type_k=cache, type_v=cache, flash_attn=request["flash"],
        verbose=False,
    )  # fmt: skip
    arrays = {}
    for width in widths:
        rows = []
        for tokens in sequences:
            model.reset()
            model._ctx.kv_cache_clear()  # the delta-net's state as well
            model.eval(tokens[:start])
            for i in range(start, len(tokens), width):
                model.eval(tokens[i : i + width])
            rows.append(np.array(model.scores[: len(tokens)], np.float32))
        arrays[f"width_{width}"] = np.stack(rows)
    model.close()
    return arrays


def _kinds(model: Any) -> list[npt.NDArray[Any]]:
    import llama_cpp as peer

    vocab, ids = model._model.vocab, range(model.n_vocab())
    attributes = np.array([peer.llama_vocab_get_attr(vocab, i) for i in ids])
    # What llama.cpp leaves out of a text, and of the rest what it looks for before it splits one.
    control = attributes & (peer.LLAMA_TOKEN_ATTR_CONTROL | peer.LLAMA_TOKEN_ATTR_UNKNOWN) != 0
    user_defined = (attributes & peer.LLAMA_TOKEN_ATTR_USER_DEFINED != 0) & ~control
    ends = np.array([peer.llama_vocab_is_eog(vocab, i) for i in ids])
    return [np.flatnonzero(of_kind) for of_kind in (control, user_defined, ends)]


def _in_file_order(default_params: Callable[[], Any]) -> Callable[[], Any]:
    """Parameters that leave weights as they are: repacked ones would run on AMX, which some virtual machines lack and
    yet promise."""

    def params() -> Any:
        changed = default_params()
        changed.use_extra_bufts = False
        return changed

    return params


if __name__ == "__main__":
    np.savez(sys.argv[2], **_answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
