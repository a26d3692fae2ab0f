"""Every public call of the package that takes arguments, with good ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields
from itertools import islice
from operator import attrgetter
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
from pydflash.runtime import Session, SessionPool
from pydflash.settings import declarations
from pydflash.state import Snapshot
from pydflash.text import Tokenizer
from tests.fuzz.outcomes import LateError

__all__ = ["CALLS", "MADE_BY_CALLS", "Call", "Parts", "good_arguments", "parameters", "public_calls", "read"]

MADE_BY_CALLS = {
    "Chunk": "Engine.stream", "Completion": "Engine.generate", "Draft": "load_draft", "Model": "load_model",
    "Piece": "Engine.stream", "Stats": "autoregressive", "Step": "autoregressive", "Stream": "Engine.stream",
    "Stats.after": "the decode loops",
    "Session.sharing": "SessionPool.session", "Session.rows_of": "Session.forward",
    "Session.feature_rows": "DraftSession.commit",
}  # fmt: skip
"""What callers get and do not make or call, and from where."""


ELSEWHERE: dict[str, Any] = {"convert_draft": convert_draft, "Tokenizer": Tokenizer}
"""What is public and not among the names of the package itself."""


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
        self.pool = SessionPool(self.model, max_sequences=2, cache_tokens=512, max_context=64)
        self.pooled = self.pool.session()
        self.snapshot = Snapshot.load(folder / "target.snapshot")
        self.draft_snapshot = Snapshot.load(folder / "draft.snapshot")

    def begin(self) -> None:
        """An empty sequence in each."""
        self.session.reset()
        self.pooled.reset()
        self.proposer.reset()
        self.engine.reset()


class Made(NamedTuple):
    """A good argument that ``make`` makes of the parts."""

    make: Callable[[Parts], Any]


class Call(NamedTuple):
    """``run(parts, **arguments)``, and good arguments."""

    run: Callable[..., Any]
    good: dict[str, Any]


def good_arguments(call: Call, parts: Parts) -> dict[str, Any]:
    return {name: value.make(parts) if isinstance(value, Made) else value for name, value in call.good.items()}


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


def _plain(function: Callable[..., Any], **good: Any) -> Call:
    return Call(lambda _, **arguments: function(**arguments), good)


def _opened(function: Callable[..., Any], **good: Any) -> Call:
    """What it returns is closed again."""

    def run(_: Parts, **arguments: Any) -> None:
        function(**arguments).close()

    return Call(run, good)


def _method(owner: str, name: str, **good: Any) -> Call:
    """``owner``: where it is among the parts."""
    return Call(lambda parts, **arguments: getattr(attrgetter(owner)(parts), name)(**arguments), good)


def _file(name: str) -> Made:
    return Made(lambda parts: parts.folder / name)


def _part(name: str) -> Made:
    return Made(attrgetter(name))


def _after_forward(parts: Parts, n: Any) -> None:
    parts.session.forward([1, 2, 3])
    parts.session.commit(n)


def _draft_commit(parts: Parts, n: Any) -> None:
    parts.session.forward([1])
    parts.session.commit(1)
    parts.proposer.commit(n)


def _draft_open(parts: Parts, session: Any) -> None:
    parts.draft.open(session).close()


def _pool_session(parts: Parts, max_context: Any) -> None:
    parts.pool.session(max_context).close()


def _restore_draft(parts: Parts, snapshot: Any) -> None:
    parts.session.restore(parts.snapshot)
    parts.proposer.restore(snapshot)


def _defaults(config: type, **others: Any) -> dict[str, Any]:
    """Good arguments of a dataclass."""
    return {field.name: field.default for field in fields(config) if field.default is not MISSING} | others


MODEL, DRAFT, SAMPLER, LOGITS = _part("model"), _part("draft"), _part("sampler"), _part("logits")
CONFIG = Made(lambda _: EngineConfig(max_context=64))
PARAMS = Made(lambda _: SamplingParams(max_tokens=2))
CONVERSATION: dict[str, Any] = {"tools": None, "variables": None, "special": "template"}
LOOP: dict[str, Any] = {
    "session": _part("session"), "prompt": [1, 2], "sampler": SAMPLER, "max_tokens": 2, "stop_ids": frozenset(),
    "cancel": None,
}  # fmt: skip
SNAPSHOT = {field.name: _part(f"snapshot.{field.name}") for field in fields(Snapshot)}
SETTINGS = dict.fromkeys(declarations(EngineConfig)) | {"threads": 1, "max_context": 64}

CALLS: dict[str, Call] = {
    "load_model": _opened(load_model, path=_file("target.gguf"), device="cpu", progress=None, threads=1, ignore=()),
    "load_draft": _opened(load_draft, path=_file("draft.gguf"), target=MODEL, progress=None, causal=None, ignore=()),
    "convert_draft": _plain(
        convert_draft,
        source=_file("hf"),
        output=_file("out.gguf"),
        target=_file("target.gguf"),
        type="f16",
        progress=None,
        ignore=(),
    ),
    "autoregressive": _plain(autoregressive, **LOOP),
    "speculative": _plain(
        speculative,
        **LOOP,
        proposer=_part("proposer"),
        draft_max=3,
        length=Made(lambda _: ProposalLength(CycleCosts())),
    ),
    "Draft.open": Call(_draft_open, {"session": _part("session")}),
    "DraftSession": _opened(DraftSession, draft=DRAFT, target=_part("session")),
    "DraftSession.commit": Call(_draft_commit, {"n": 1}),
    "DraftSession.propose": _method("proposer", "propose", history=[1], count=2),
    "DraftSession.restore": Call(_restore_draft, {"snapshot": _part("draft_snapshot")}),
    "Engine": _opened(Engine, model=MODEL, draft=DRAFT, config=CONFIG),
    "Engine.share": _opened(Engine.share, model=MODEL, draft=None, config=CONFIG),
    "Engine.load": _opened(
        Engine.load, path=_file("target.gguf"), draft=_file("draft.gguf"), progress=None, environment={}, **SETTINGS
    ),
    "Engine.stream": _method("engine", "stream", prompt=[1, 2], params=None, speculate=True, **CONVERSATION),
    "Engine.generate": _method("engine", "generate", prompt=[1, 2], params=PARAMS, speculate=True, **CONVERSATION),
    "Engine.encode": _method("engine", "encode", prompt="a", **CONVERSATION),
    "Engine.read": _method("engine", "read", ids=[1, 2]),
    "Engine.steps": _method(
        "engine", "steps", ids=[1, 2], sampler=SAMPLER, max_tokens=2, stop_ids=frozenset(), speculate=True, cancel=None
    ),
    "Sampler": _plain(Sampler, params=PARAMS, vocab_size=320, mask_fn=None),
    "Sampler.draw": _method("sampler", "draw", logits=LOGITS, history=[1, 2]),
    "Sampler.probabilities": _method("sampler", "probabilities", logits=LOGITS, history=[1, 2]),
    "Sampler.restore": _method("sampler", "restore", state=Made(lambda parts: parts.sampler.state())),
    "SamplingParams": _plain(SamplingParams, **_defaults(SamplingParams)),
    "Session": _opened(Session, model=MODEL, capture=(0,), **_defaults(SessionConfig, max_context=64)),
    "Session.forward": _method("session", "forward", tokens=[1, 2], logits="last"),
    "Session.prefill": _method("session", "prefill", tokens=[1, 2]),
    "Session.check_prompt": _method("session", "check_prompt", tokens=[1, 2], after=None),
    "Session.stands_at": _method("session", "stands_at", place=_part("snapshot.place")),
    "Session.commit": Call(_after_forward, {"n": 1}),
    "Session.restore": _method("session", "restore", snapshot=_part("snapshot")),
    "SessionPool": _opened(
        SessionPool,
        model=MODEL,
        max_sequences=2,
        cache_tokens=512,
        capture=(0,),
        **_defaults(SessionConfig, max_context=64),
    ),
    "SessionPool.session": Call(_pool_session, {"max_context": 32}),
    "SessionPool.forward": _method("pool", "forward", rows=Made(lambda parts: [(parts.pooled, [1, 2])]), logits="last"),
    "Snapshot": _plain(Snapshot, **SNAPSHOT),
    "Snapshot.load": _plain(Snapshot.load, path=_file("target.snapshot")),
    "Snapshot.save": _method("snapshot", "save", path=_file("again.snapshot")),
    "Tokenizer.encode": _method("model.tokenizer", "encode", text="a b", special=True, added=True),
    "Tokenizer.decode": _method("model.tokenizer", "decode", tokens=[1, 2], skip_special=False),
    "Tokenizer.checked": _method("model.tokenizer", "checked", token=1),
    "Tokenizer.token_bytes": _method("model.tokenizer", "token_bytes", token=1),
    "Tokenizer.token_id": _method("model.tokenizer", "token_id", text="a"),
}


def parameters(name: str) -> set[str]:
    """The names of a call's arguments, but for keyword arguments without a name of their own."""
    owner, _, method = name.partition(".")
    found = ELSEWHERE.get(owner) or getattr(pydflash, owner)
    listed = inspect.signature(getattr(found, method) if method else found).parameters
    return {
        parameter.name
        for parameter in listed.values()
        if parameter.name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def public_calls() -> Iterable[str]:
    """The public functions, classes and methods that take arguments, as ``name`` and ``class.method``."""
    for name in pydflash.__all__:
        public = getattr(pydflash, name)
        if isinstance(public, type) and issubclass(public, BaseException):
            continue
        yield name
        for method, found in vars(public).items() if isinstance(public, type) else ():
            function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            if len(inspect.signature(function).parameters) > 1:
                yield f"{name}.{method}"
