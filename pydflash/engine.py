"""The engine: a model, its draft and one sequence behind two calls, ``stream`` and ``generate``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from pydflash.config import EngineConfig, Setting, Settings, table
from pydflash.decode import FinishReason, Stats, Step, autoregressive, speculative
from pydflash.draft import Draft, DraftSession, load_draft
from pydflash.errors import ConfigError, SessionClosed, ShapeError, StateError
from pydflash.machine import processors
from pydflash.models import Model, load_model
from pydflash.sampling import Sampler, SamplingParams
from pydflash.session import Session
from pydflash.tokenizer import Tokenizer
from pydflash.weights import Progress
from pydflash.width import adapts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pydflash.chat import ChatTemplate

__all__ = ["Chunk", "Completion", "Engine", "FinishReason", "Piece", "Prompt", "StopFilter", "Stream"]

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]] | Sequence[int]"
"""Raw text, messages for the chat template, or token ids."""


@dataclass(frozen=True)
class Piece:
    """Text that became final with one token. ``accepted``: the draft had proposed that token."""

    text: str
    accepted: bool


@dataclass(frozen=True)
class Chunk:
    """What one step added. ``accepted`` says of each token whether the draft had proposed it.

    ``text`` can lag behind ``tokens``: an incomplete character and text that may turn into a stop string are held back.
    ``pieces`` is ``text`` token by token. ``stats`` are those of the generation up to here. ``finish_reason`` is set on
    the last chunk only.
    """

    text: str
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    pieces: tuple[Piece, ...]
    stats: Stats
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A finished generation. ``tokens`` include the end-of-turn token or the stop string's, ``text`` does not."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


def _threads(count: int) -> str | None:
    """What to say of ``count`` threads: they wait for one another at every operation, so that none must be kept off."""
    usable = processors().usable
    if count > usable:
        return f"{count}, of which {usable} can run at once; that is many times slower than {usable}"
    return str(count) if count else None


class StopFilter:
    """Passes text on up to the first stop string, holding back an end that may be the start of one.

    The first stop string to be complete wins, of two that end together the longer, however the text is cut.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was met (which ends the filter's use)."""
        if not self._stop:
            return text, False
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)[1]], True
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        certain = len(self._held) - keep
        out, self._held = self._held[:certain], self._held[certain:]
        return out, False

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that starts ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class _Caller:
    """Whoever generates with an engine, as its stream and the engine both know it."""

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.advancing = threading.Lock()  # held while the next chunk is made
        self.thread: threading.Thread | None = None  # that asked for a chunk last
        self.done = False

    @property
    def in_the_way(self) -> bool:
        """Whether another caller must not take the engine: another thread may ask for the next chunk, or waits for it.

        A stream that was left unfinished, in a variable or a traceback, gives way to the next call of its own thread,
        and to all once that has ended.
        """
        if self.done or self.thread is None:
            return False
        return self.advancing.locked() or (self.thread is not threading.current_thread() and self.thread.is_alive())


class Stream(Iterator[Chunk]):
    """The chunks of one generation. ``close()`` ends it, from any thread, and so does leaving a ``with`` block.

    A thread that waits for the next chunk meanwhile gets a last one, whose ``finish_reason`` is "cancelled", after the
    step or the chunk of the prompt under way.
    """

    def __init__(self, chunks: Generator[Chunk, None, None], caller: _Caller) -> None:
        self._chunks, self._caller = chunks, caller

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if not self._caller.advancing.acquire(blocking=False):
            raise StateError("another thread waits for this stream's next chunk; give each thread a stream of its own")
        try:
            self._caller.thread = threading.current_thread()
            return next(self._chunks)
        finally:
            self._caller.advancing.release()

    def close(self) -> None:
        """End the generation. Safe to call twice."""
        self._caller.cancel.set()
        if self._caller.advancing.acquire(blocking=False):  # else the thread that makes the next chunk ends it
            try:
                self._chunks.close()
            finally:
                self._caller.advancing.release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Engine:
    """One model on one device, with or without a draft, generating for one caller at a time.

    Made by :meth:`load`; ``close()`` or ``with`` frees everything. ``config`` holds the effective settings, ``model``,
    ``draft`` and ``session`` the parts. Each call starts a new sequence.
    """

    def __init__(self, model: Model, draft: Draft | None, config: EngineConfig, undo: ExitStack) -> None:
        """``undo`` owns what is open already; the engine adds its sessions and closes all of it."""
        if draft is not None:
            _check_draft_max(config, draft)
        self.model, self.draft, self.config, self._undo = model, draft, config, undo
        taps = draft.config.taps if draft else ()
        self.session = undo.enter_context(Session(model, **config.of_session(), capture=taps))
        self.draft_session = undo.enter_context(DraftSession(draft, self.session)) if draft else None
        self._callers = threading.Lock()  # held while the two change
        self._caller: _Caller | None = None
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        draft: str | Path | None = None,
        *,
        progress: Progress | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: Unpack[Settings],
    ) -> Engine:
        """Load a GGUF model and, if given, its DFlash draft. EngineConfig describes the settings and holds their
        defaults.

        None leaves a setting to the environment (``PYDFLASH_<NAME>``; ``environment`` replaces ``os.environ``) or its
        default. ``progress(bytes_done, bytes_total)`` runs once over the model, then over the draft.
        Raises ConfigError, LoadError, NoDevice or OutOfMemory; nothing stays allocated then.
        """
        config = EngineConfig.resolve(environment, **settings)
        with ExitStack() as undo:
            model = undo.enter_context(load_model(path, config.device, progress, threads=config.threads))
            loaded = load_draft(draft, model, progress, causal=config.draft_causal) if draft is not None else None
            if loaded is not None:
                undo.enter_context(loaded)
            return cls._owning(undo, model, loaded, config)

    @classmethod
    def share(cls, model: Model, draft: Draft | None, config: EngineConfig) -> Engine:
        """An engine with sessions of its own on a model and a draft that stay the caller's: close it before them.

        ``config.device``, ``threads`` and ``draft_causal`` were settled when those were loaded. Raises ConfigError or
        OutOfMemory; nothing stays allocated then.
        """
        with ExitStack() as undo:
            return cls._owning(undo, model, draft, config)

    @classmethod
    def _owning(cls, undo: ExitStack, model: Model, draft: Draft | None, config: EngineConfig) -> Engine:
        """An engine that takes over what ``undo`` holds; when it cannot be made, ``undo`` is left as it is."""
        engine = cls(model, draft, config, undo)
        engine._undo = undo.pop_all()
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's template; TemplateError when it has none or it does not compile."""
        from pydflash.chat import ChatTemplate  # jinja2 is slow to import and raw prompts need none of it

        return ChatTemplate.from_metadata(self.model.file.metadata)

    # --- generating -------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        speculate: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Stream:
        """Generate, yielding a Chunk per step. Closing the stream cancels; the engine can be used again at once.

        ``prompt``: text is taken as it is, messages go through the chat template (with ``tools`` and its own
        ``variables``, such as ``{"enable_thinking": False}``), token ids are used unchanged. ``speculate`` False leaves
        a loaded draft aside. A stream that this thread left unfinished ends. Raises ConfigError, TemplateError,
        ShapeError for an empty prompt, ContextFull, SessionClosed, NativeError, and StateError while another thread
        generates.
        """
        self._check_open()
        params = params or SamplingParams()
        ids = self.encode(prompt, tools=tools, variables=variables)
        if not ids:
            raise ShapeError("the prompt is empty; give at least one token")
        sampler = Sampler(params, self.model.config.vocab)
        caller = _Caller()
        stream = Stream(self._stream(ids, params, sampler, speculate, caller), caller)
        with self._callers:
            self._streams.add(stream)
        return stream

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        speculate: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Completion:
        """:meth:`stream` to the end, in one piece."""
        with self.stream(prompt, params, speculate=speculate, tools=tools, variables=variables) as stream:
            chunks = list(stream)
        last = chunks[-1] if chunks else Chunk("", (), (), (), Stats())  # closed by another thread before the first
        tokens = tuple(token for chunk in chunks for token in chunk.tokens)
        text = "".join(chunk.text for chunk in chunks)
        return Completion(text, tokens, last.finish_reason or "cancelled", last.stats)

    def cancel(self) -> None:
        """End the generation under way, if any, from any thread: after its step, or its chunk of the prompt.

        Whoever reads its stream gets a last chunk whose ``finish_reason`` is "cancelled".
        """
        caller = self._caller
        if caller is not None:
            caller.cancel.set()

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that ``stream`` would start from."""
        if not isinstance(prompt, str):
            if prompt and all(isinstance(item, int) for item in prompt):
                return list(cast("Sequence[int]", prompt))
            messages = cast("Sequence[Mapping[str, Any]]", prompt)
            prompt = self.chat_template.render(messages, tools=tools, **(variables or {}))
        elif tools or variables:
            raise ConfigError("tools and variables are for the chat template; give messages instead of a string")
        ids = self.tokenizer.encode(prompt)
        bos = self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _stream(
        self, ids: list[int], params: SamplingParams, sampler: Sampler, speculate: bool, caller: _Caller
    ) -> Generator[Chunk, None, None]:
        self._take(caller)
        text, stats = _Text(self.tokenizer, params.stop), Stats()
        try:
            stop_ids = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
            self.reset()
            for step in self.steps(
                ids, sampler, params.max_tokens, stop_ids, speculate=speculate, cancel=caller.cancel
            ):
                chunk = text.chunk(step)
                stats = chunk.stats
                yield chunk
                if chunk.finish_reason is not None:
                    return
                if self._caller is not caller:
                    raise StateError(
                        "this stream was left unfinished and its thread has generated something else since"
                    )
        except SessionClosed:
            if not caller.cancel.is_set():
                raise
            yield text.chunk(Step((), finish_reason="cancelled", stats=stats))
        finally:
            caller.done = True

    def _take(self, caller: _Caller) -> None:
        """Make ``caller`` the one who generates; StateError while another thread does."""
        with self._callers:
            self._check_open()
            if self._caller is not None and self._caller.in_the_way:
                raise StateError(
                    "this engine is generating already for another thread; finish, close or cancel that stream, or use "
                    "another engine"
                )
            self._caller = caller

    # --- one sequence -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Start a new sequence."""
        self.session.reset()
        if self.draft_session is not None:
            self.draft_session.reset()

    def read(self, ids: Sequence[int]) -> Generator[None, None, Sequence[int]]:
        """Read a prompt but its last chunk, pausing after each chunk when the device is done; returns what is left.

        For measurements: ``steps`` begins with what is left, and does the same work as with the whole prompt.
        """
        head = (len(ids) - 1) // self.session.chunk * self.session.chunk
        for output in self.session.prefill(ids[:head]) if head else ():
            if self.draft_session is not None:
                self.draft_session.keep(output.count)
            self.model.backend.synchronize()
            yield
        return ids[head:]

    def steps(
        self, ids: Sequence[int], sampler: Sampler, max_tokens: int, stop_ids: frozenset[int], *,
        speculate: bool = True, cancel: threading.Event | None = None,
    ) -> Iterator[Step]:  # fmt: skip
        """Continue the sequence by ``ids``, then decode, with the draft when there is one."""
        if self.draft_session is None or not speculate:
            steps = autoregressive(self.session, ids, sampler, max_tokens=max_tokens, stop_ids=stop_ids, cancel=cancel)
            return steps if self.draft_session is None else map(_without_speculation, steps)
        return speculative(
            self.session, self.draft_session, ids, sampler, max_tokens=max_tokens, stop_ids=stop_ids,
            draft_max=self.config.draft_max, adaptive=self._adaptive, cancel=cancel,
        )  # fmt: skip

    def _proposal(self, block: int) -> str:
        most = f"{min(self.config.draft_max or block, block)} tokens"
        return f"up to {most}, as many as are expected to pay" if self._adaptive else most

    @property
    def _adaptive(self) -> bool:
        return adapts(self.config.adaptive, self.model.backend)

    # --- what there is ----------------------------------------------------------------------------------------------

    def settings(self) -> tuple[Setting, ...]:
        """Every effective value and where it came from: the configuration, then what follows from it and the files."""
        model, session, backend = self.model, self.session, self.model.backend
        derived: list[tuple[str, Any, str]] = [
            ("model", str(model.path), "argument"),
            ("device in use", f"{backend.name} ({backend.description})", "device"),
            ("threads in use", _threads(backend.threads), "threads"),
            ("weights", f"{model.weights.nbytes:,} bytes", "model"),
            ("K basis", session.cache.basis.name, "k_rotation, cache_k, head size"),
            ("V basis", session.cache.v_basis.name, "v_rotation"),
            (
                "K/V cache",
                f"{session.cache.nbytes:,} bytes, {session.cache.capacity:,} positions",
                "max_context, cache_k, cache_v",
            ),
            ("delta-net state", f"{session.delta.state_nbytes:,} bytes", "model"),
            ("rollback tape", f"{session.delta.tape_nbytes:,} bytes", "model"),
        ]
        if self.draft is not None and self.draft_session is not None:
            config = self.draft.config
            derived += [
                ("draft", str(self.draft.path), "argument"),
                ("block size", config.block_size, "draft"),
                ("tapped layers", ", ".join(map(str, config.taps)), "draft"),
                ("windows", ", ".join(str(w) if w else "full" for w in config.windows), "draft"),
                ("causal layers", ", ".join("yes" if c else "no" for c in config.causal), self._causal_source()),
                ("proposal", self._proposal(config.block_size - 1), "draft_max, block size, adaptive, device"),
                ("draft cache", f"{self.draft_session.cache.nbytes:,} bytes", "max_context, windows"),
            ]
        return (*self.config.settings(), *(Setting(*entry) for entry in derived))

    def explain(self) -> str:
        """:meth:`settings` as a table."""
        return table(self.settings())

    def _causal_source(self) -> str:
        assert self.draft is not None
        if self.config.draft_causal is not None:
            return "draft_causal"
        said = "attention.causal" in " ".join(self.draft.file.metadata)
        return "draft" if said else "the draft does not say: sliding layers are causal, full ones are not"

    def close(self) -> None:
        """End all streams and free everything, after the step under way in another thread. Safe to call twice."""
        with self._callers:
            self._closed, streams = True, list(self._streams)
        for stream in streams:
            stream.close()
        self._undo.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this engine was closed; load another one")


class _Text:
    """Turns steps into chunks: text of tokens, less what may still change, cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.decoder(skip_special=True)
        self._filter = StopFilter(stop)

    def chunk(self, step: Step) -> Chunk:
        pieces: list[Piece] = []
        tokens, stats, reason = step.tokens, step.stats, step.finish_reason
        for i, token in enumerate(step.tokens):
            text, stopped = self._filter.push(self._decoder.push(token))
            pieces.append(Piece(text, i < step.accepted))
            if stopped:
                tokens, reason = tokens[: i + 1], "stop"
                stats = replace(stats, tokens=stats.tokens - len(step.tokens) + len(tokens))
                break
        else:
            if reason is not None:
                pieces.append(self._end(pieces.pop() if pieces else Piece("", False)))
        accepted = tuple(i < step.accepted for i in range(len(tokens)))
        return Chunk("".join(p.text for p in pieces), tokens, accepted, tuple(pieces), stats, reason)

    def _end(self, last: Piece) -> Piece:
        """The last piece, with everything that was held back; an unfinished character can complete no stop string."""
        text, stopped = self._filter.push(self._decoder.flush())
        return Piece(last.text + text + ("" if stopped else self._filter.flush()), last.accepted)


def _without_speculation(step: Step) -> Step:
    return replace(step, stats=replace(step.stats, fallback="speculate=False was asked for"))


def _check_draft_max(config: EngineConfig, draft: Draft) -> None:
    limit = draft.config.block_size - 1
    if config.draft_max is not None and config.draft_max > limit:
        raise ConfigError(f"draft_max is {config.draft_max}; {draft.path} proposes 1..{limit} tokens")
