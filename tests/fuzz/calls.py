"""Every public call of the package that takes arguments, with good ones."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pydflash
from pydflash.config import EngineConfig, SessionConfig
from pydflash.decode import Sampler, SamplingParams, autoregressive, speculative
from pydflash.drafts import CycleCosts, Draft, DraftSession, ProposalLength, load_draft
from pydflash.engine import Engine
from pydflash.errors import ConfigError, ContextFull, ShapeError
from pydflash.files.convert import convert_draft
from pydflash.models import load_model
from pydflash.runtime import Session
from pydflash.state import Snapshot
from tests.fuzz.outcomes import LateError

__all__ = ["CALLS", "MADE_BY_CALLS", "Call", "Parts", "public_calls"]

MADE_BY_CALLS = {
    "Chunk": "Engine.stream", "Completion": "Engine.generate", "Draft": "load_draft", "Model": "load_model",
    "Piece": "Engine.stream", "Stats": "autoregressive", "Step": "autoregressive", "Stream": "Engine.stream",
    "Stats.after": "the decode loops",
}  # fmt: skip
"""What callers get and do not make, and from where."""


class Parts:
    """A loaded pair and what is opened on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = load_model(folder / "target.gguf", "cpu", threads=1)
        draft = load_draft(folder / "draft.gguf", self.model)
        assert isinstance(draft, Draft)
        self.draft = draft
        self.session = Session(self.model, 64, capture=draft.taps)
        self.proposer = DraftSession(draft, self.session)
        self.engine = Engine.share(self.model, draft, EngineConfig(max_context=64))
        self.sampler = Sampler(SamplingParams(temperature=0.5, repetition_penalty=1.1), self.model.config.vocab)
        self.logits = np.zeros(self.model.config.vocab, np.float32)
        self.snapshot = Snapshot.load(folder / "target.snapshot")
        self.draft_snapshot = Snapshot.load(folder / "draft.snapshot")

    def begin(self) -> None:
        """An empty sequence in each."""
        self.session.reset()
        self.proposer.reset()
        self.engine.reset()


class Call(NamedTuple):
    """``run(parts, **arguments)``, and good arguments: a value, or a function of the parts that makes one."""

    run: Callable[..., Any]
    good: dict[str, Any]


class _Made(NamedTuple):
    make: Callable[[Parts], Any]


def _of(make: Callable[[Parts], Any]) -> Any:
    return _Made(make)


def good_arguments(call: Call, parts: Parts) -> dict[str, Any]:
    return {name: value.make(parts) if isinstance(value, _Made) else value for name, value in call.good.items()}


def read(result: Any) -> None:
    """The first items of what is read step by step. LateError when it refuses an argument only then."""
    if isinstance(result, Iterator):
        try:
            list(islice(result, 3))
        except (ConfigError, ShapeError, ContextFull) as error:
            raise LateError(str(error)) from error
        finally:
            if hasattr(result, "close"):
                result.close()


_COMMIT = {"n": 1}
_GENERATION = {"prompt": [1, 2], "params": None, "speculate": True, "tools": None, "variables": None}
_LOOP = {
    "session": _of(lambda parts: parts.session), "prompt": [1, 2], "sampler": _of(lambda parts: parts.sampler),
    "max_tokens": 2, "stop_ids": frozenset(), "cancel": None,
}  # fmt: skip
_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("k_rotation", "v_rotation", "fused", "chunk", "device", "draft_max", "adaptive", "draft_causal")),
    "threads": 1, "max_context": 64, "cache_k": "f16", "cache_v": "f16",
}  # fmt: skip


def _closed(result: Any) -> None:
    with closing(result):
        pass


def _after_forward(parts: Parts, n: Any) -> None:
    parts.session.forward([1, 2, 3])
    parts.session.commit(n)


def _draft_commit(parts: Parts, n: Any) -> None:
    parts.session.forward([1])
    parts.session.commit(1)
    parts.proposer.commit(n)


def _session(parts: Parts, **arguments: Any) -> None:
    _closed(Session(arguments.pop("model"), **arguments))


def _snapshot(_: Parts, **arguments: Any) -> None:
    Snapshot(**arguments)


def _restore_draft(parts: Parts, snapshot: Any) -> None:
    parts.session.restore(parts.snapshot)
    parts.proposer.restore(snapshot)


CALLS: dict[str, Call] = {
    "load_model": Call(
        lambda _, **a: _closed(load_model(**a)),
        {"path": _of(lambda parts: parts.folder / "target.gguf"), "device": "cpu", "progress": None, "threads": 1},
    ),
    "load_draft": Call(
        lambda _, **a: _closed(load_draft(**a)),
        {"path": _of(lambda parts: parts.folder / "draft.gguf"), "target": _of(lambda parts: parts.model),
         "progress": None, "causal": None},
    ),
    "convert_draft": Call(
        lambda _, **a: convert_draft(**a),
        {"source": _of(lambda parts: parts.folder / "hf"), "output": _of(lambda parts: parts.folder / "out.gguf"),
         "target": _of(lambda parts: parts.folder / "target.gguf"), "type": "f16", "progress": None},
    ),
    "autoregressive": Call(lambda _, **a: autoregressive(**a), _LOOP),
    "speculative": Call(
        lambda _, **a: speculative(**a),
        {**_LOOP, "proposer": _of(lambda parts: parts.proposer), "draft_max": 3,
         "length": _of(lambda _: ProposalLength(CycleCosts()))},
    ),
    "Draft.open": Call(lambda parts, **a: _closed(parts.draft.open(**a)), {"session": _of(lambda parts: parts.session)}),
    "DraftSession": Call(
        lambda _, **a: _closed(DraftSession(**a)),
        {"draft": _of(lambda parts: parts.draft), "target": _of(lambda parts: parts.session)},
    ),
    "DraftSession.commit": Call(_draft_commit, _COMMIT),
    "DraftSession.propose": Call(lambda parts, **a: parts.proposer.propose(**a), {"history": [1], "count": 2}),
    "DraftSession.restore": Call(_restore_draft, {"snapshot": _of(lambda parts: parts.draft_snapshot)}),
    "Engine": Call(
        lambda _, **a: _closed(Engine(**a)),
        {"model": _of(lambda parts: parts.model), "draft": _of(lambda parts: parts.draft),
         "config": _of(lambda _: EngineConfig(max_context=64))},
    ),
    "Engine.share": Call(
        lambda _, **a: _closed(Engine.share(**a)),
        {"model": _of(lambda parts: parts.model), "draft": None, "config": _of(lambda _: EngineConfig(max_context=64))},
    ),
    "Engine.load": Call(
        lambda _, **a: _closed(Engine.load(**a)),
        {"path": _of(lambda parts: parts.folder / "target.gguf"), "draft": _of(lambda parts: parts.folder / "draft.gguf"),
         "progress": None, "environment": {}, **_SETTINGS},
    ),
    "Engine.stream": Call(lambda parts, **a: parts.engine.stream(**a), _GENERATION),
    "Engine.generate": Call(
        lambda parts, **a: parts.engine.generate(**a), {**_GENERATION, "params": _of(lambda _: SamplingParams(max_tokens=2))}
    ),
    "Engine.encode": Call(lambda parts, **a: parts.engine.encode(**a), {"prompt": "a", "tools": None, "variables": None}),
    "Engine.read": Call(lambda parts, **a: parts.engine.read(**a), {"ids": [1, 2]}),
    "Engine.steps": Call(
        lambda parts, **a: parts.engine.steps(**a),
        {"ids": [1, 2], "sampler": _of(lambda parts: parts.sampler), "max_tokens": 2, "stop_ids": frozenset(),
         "speculate": True, "cancel": _of(lambda _: threading.Event())},
    ),
    "Sampler": Call(
        lambda _, **a: Sampler(**a), {"params": _of(lambda _: SamplingParams()), "vocab_size": 320, "mask_fn": None}
    ),
    "Sampler.draw": Call(
        lambda parts, **a: parts.sampler.draw(**a), {"logits": _of(lambda parts: parts.logits), "history": [1, 2]}
    ),
    "Sampler.probabilities": Call(
        lambda parts, **a: parts.sampler.probabilities(**a), {"logits": _of(lambda parts: parts.logits), "history": [1, 2]}
    ),
    "Sampler.restore": Call(
        lambda parts, **a: parts.sampler.restore(**a), {"state": _of(lambda parts: parts.sampler.state())}
    ),
    "SamplingParams": Call(
        lambda _, **a: SamplingParams(**a),
        {name: None if name in ("logit_bias", "seed") else field.default
         for name, field in SamplingParams.__dataclass_fields__.items()},
    ),
    "Session": Call(
        _session,
        {"model": _of(lambda parts: parts.model), "capture": (0,),
         **{name: field.default for name, field in SessionConfig.__dataclass_fields__.items()}, "max_context": 64},
    ),
    "Session.forward": Call(lambda parts, **a: parts.session.forward(**a), {"tokens": [1, 2], "logits": "last"}),
    "Session.prefill": Call(lambda parts, **a: parts.session.prefill(**a), {"tokens": [1, 2]}),
    "Session.check_prompt": Call(lambda parts, **a: parts.session.check_prompt(**a), {"tokens": [1, 2], "after": None}),
    "Session.stands_at": Call(
        lambda parts, **a: parts.session.stands_at(**a), {"place": _of(lambda parts: parts.snapshot.place)}
    ),
    "Session.commit": Call(_after_forward, _COMMIT),
    "Session.restore": Call(
        lambda parts, **a: parts.session.restore(**a), {"snapshot": _of(lambda parts: parts.snapshot)}
    ),
    "Snapshot": Call(
        _snapshot,
        {name: _of(lambda parts, name=name: getattr(parts.snapshot, name)) for name in Snapshot.__dataclass_fields__},
    ),
    "Snapshot.load": Call(lambda _, **a: Snapshot.load(**a), {"path": _of(lambda parts: parts.folder / "target.snapshot")}),
    "Snapshot.save": Call(
        lambda parts, **a: parts.snapshot.save(**a), {"path": _of(lambda parts: parts.folder / "again.snapshot")}
    ),
    "Tokenizer.encode": Call(lambda parts, **a: parts.model.tokenizer.encode(**a), {"text": "a b", "special": True}),
    "Tokenizer.decode": Call(
        lambda parts, **a: parts.model.tokenizer.decode(**a), {"tokens": [1, 2], "skip_special": False}
    ),
    "Tokenizer.token_bytes": Call(lambda parts, **a: parts.model.tokenizer.token_bytes(**a), {"token": 1}),
    "Tokenizer.token_id": Call(lambda parts, **a: parts.model.tokenizer.token_id(**a), {"text": "a"}),
}  # fmt: skip


def public_calls() -> Iterable[str]:
    """The public functions, classes and methods that take arguments, as ``name`` and ``class.method``."""
    for name in pydflash.__all__:
        public = getattr(pydflash, name)
        if isinstance(public, type) and issubclass(public, BaseException):
            continue
        yield name
        for method, found in vars(public).items() if isinstance(public, type) else ():
            function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
            if not method.startswith("_") and inspect.isfunction(function):
                if len(inspect.signature(function).parameters) > 1:
                    yield f"{name}.{method}"
