"""The engine: a model, its draft and one sequence behind two calls, ``stream`` and ``generate``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from pydflash.arguments import an_instance
from pydflash.config import EngineConfig, Setting, Settings, table
from pydflash.decode import Sampler, SamplingParams, Stats, Step, autoregressive, speculative
from pydflash.drafts import CycleCosts, LoadedDraft, ProposalLength, adapts, load_draft
from pydflash.engine.completion import Chunk, Completion, chunk_of
from pydflash.engine.explain import derived
from pydflash.engine.stream import Caller, Stream
from pydflash.errors import ConfigError, SessionClosed, StateError
from pydflash.models import Model, Progress, load_model
from pydflash.runtime import Session
from pydflash.text import TextStream, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pydflash.text.chat import ChatTemplate

__all__ = ["Engine", "Prompt"]

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]] | Sequence[int]"
"""Raw text, messages for the chat template, or token ids."""


class Engine:
    """One model on one device, with or without a draft, generating for one caller at a time.

    Made by :meth:`load`; ``close()`` or ``with`` frees everything. ``config`` holds the effective settings, ``model``,
    ``draft`` and ``session`` the parts. Each call starts a new sequence.
    """

    def __init__(self, model: Model, draft: LoadedDraft | None, config: EngineConfig) -> None:
        """An engine with sessions of its own; ``load`` and ``share`` are how to get one."""
        an_instance(model, Model, "model")
        an_instance(config, EngineConfig, "config")
        if draft is not None:
            an_instance(draft, LoadedDraft, "draft")
        if draft is not None and config.draft_max is not None and config.draft_max > draft.limit:
            raise ConfigError(f"draft_max is {config.draft_max}; {draft.path} proposes 1..{draft.limit} tokens")
        self.model, self.draft, self.config = model, draft, config
        with ExitStack() as undo:
            taps = draft.taps if draft else ()
            self.session = undo.enter_context(Session(model, **config.of_session(), capture=taps))
            self.draft_session = undo.enter_context(closing(draft.open(self.session))) if draft else None
            self._sessions = undo.pop_all()
        self._loaded = ExitStack()  # what is the engine's own besides
        self._costs = CycleCosts()
        self._callers = threading.Lock()  # held while the two change
        self._caller: Caller | None = None
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
        """Load a GGUF model and, if given, its draft: a GGUF file, or the name of one without a file, such as "ngram".

        EngineConfig describes the settings and holds their defaults. None leaves one to the environment
        (``PYDFLASH_<NAME>``; ``environment`` replaces ``os.environ``) or its default. ``progress(bytes_done,
        bytes_total)`` runs once over the model, then over the draft. Raises ConfigError, LoadError, NoDevice or
        OutOfMemory; nothing stays allocated then.
        """
        config = EngineConfig.resolve(environment, **settings)
        with ExitStack() as undo:
            model = undo.enter_context(load_model(path, config.device, progress, threads=config.threads))
            loaded = load_draft(draft, model, progress, causal=config.draft_causal) if draft is not None else None
            if loaded is not None:
                undo.enter_context(closing(loaded))
            engine = cls(model, loaded, config)
            engine._loaded = undo.pop_all()
            return engine

    @classmethod
    def share(cls, model: Model, draft: LoadedDraft | None, config: EngineConfig) -> Engine:
        """An engine with its own sessions on a model and a draft that the caller owns; close it before them.

        ``config.device``, ``threads`` and ``draft_causal`` were settled when those were loaded. Raises ConfigError or
        OutOfMemory; nothing stays allocated then.
        """
        return cls(model, draft, config)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's template; TemplateError when it has none or it does not compile."""
        from pydflash.text.chat import ChatTemplate  # jinja2 is slow to import, and raw prompts do not need it

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
        a loaded draft aside. Raises ConfigError, TemplateError, ShapeError for an empty prompt, ContextFull,
        SessionClosed, and StateError while another thread generates.

        Generation begins with the first chunk that is asked for, which ends a stream that this thread left unfinished;
        a stream that is never read keeps nobody from the engine. A chunk raises NativeError, and the first one
        StateError where another thread has begun to generate since this call.
        """
        self._check_open()
        params = SamplingParams() if params is None else an_instance(params, SamplingParams, "params")
        an_instance(speculate, bool, "speculate")
        ids = self.session.check_prompt(self.encode(prompt, tools=tools, variables=variables), after=0).tolist()
        sampler = Sampler(params, self.model.config.vocab)
        caller = Caller()
        stream = Stream(self._stream(ids, params, sampler, speculate, caller), caller)
        with self._callers:
            self._check_free()
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
        """The token ids that ``stream`` would start from. Raises ConfigError, TemplateError, SessionClosed."""
        self._check_open()
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
        self, ids: list[int], params: SamplingParams, sampler: Sampler, speculate: bool, caller: Caller
    ) -> Generator[Chunk, None, None]:
        self._take(caller)
        text, stats = TextStream(self.tokenizer, params.stop), Stats()
        try:
            stop_ids = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
            self.reset()
            for step in self.steps(
                ids, sampler, params.max_tokens, stop_ids, speculate=speculate, cancel=caller.cancel
            ):
                chunk = chunk_of(step, text)
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
            yield chunk_of(Step((), finish_reason="cancelled", stats=stats), text)
        finally:
            caller.done = True

    def _take(self, caller: Caller) -> None:
        """Make ``caller`` the one who generates; StateError while another thread does."""
        with self._callers:
            self._check_free()
            self._caller = caller

    def _check_free(self) -> None:
        """With ``_callers`` held: raises SessionClosed, and StateError while another thread generates."""
        self._check_open()
        if self._caller is not None and self._caller.in_the_way:
            raise StateError(
                "this engine is generating already for another thread; finish, close or cancel that stream, or use "
                "another engine"
            )

    # --- one sequence -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Start a new sequence."""
        self._check_open()
        self.session.reset()
        if self.draft_session is not None:
            self.draft_session.reset()

    def read(self, ids: Sequence[int]) -> Generator[None, None, Sequence[int]]:
        """Read a prompt but its last chunk, pausing after each chunk when the device is done; returns what is left.

        For measurements: ``steps`` begins with what is left, and does the same work as with the whole prompt. Raises
        what :meth:`Session.check_prompt` does.
        """
        return self._read(self.session.check_prompt(ids).tolist())

    def _read(self, ids: list[int]) -> Generator[None, None, Sequence[int]]:
        head = (len(ids) - 1) // self.session.chunk * self.session.chunk
        for output in self.session.prefill(ids[:head]) if head else ():
            if self.draft_session is not None:
                self.draft_session.commit(output.count)
            self.model.backend.synchronize()
            yield
        return ids[head:]

    def steps(
        self, ids: Sequence[int], sampler: Sampler, max_tokens: int, stop_ids: frozenset[int], *,
        speculate: bool = True, cancel: threading.Event | None = None,
    ) -> Iterator[Step]:  # fmt: skip
        """Continue the sequence by ``ids``, then decode, with the draft when there is one."""
        an_instance(speculate, bool, "speculate")
        if self.draft_session is None or not speculate:
            steps = autoregressive(self.session, ids, sampler, max_tokens=max_tokens, stop_ids=stop_ids, cancel=cancel)
            return steps if self.draft_session is None else map(_without_speculation, steps)
        return speculative(
            self.session, self.draft_session, ids, sampler, max_tokens=max_tokens, stop_ids=stop_ids,
            draft_max=self.config.draft_max, length=ProposalLength(self._costs) if self._adaptive else None,
            cancel=cancel,
        )  # fmt: skip

    @property
    def _adaptive(self) -> bool:
        return adapts(self.config.adaptive, self.model.backend)

    # --- settings ---------------------------------------------------------------------------------------------------

    def settings(self) -> tuple[Setting, ...]:
        """Every effective value and where it came from: the configuration, then what follows from it and the files.

        Raises SessionClosed.
        """
        self._check_open()
        most = self.config.draft_max
        return (*self.config.settings(), *derived(self.session, self.draft, self.draft_session, most, self._adaptive))

    def explain(self) -> str:
        """:meth:`settings` as a table."""
        return table(self.settings())

    def close(self) -> None:
        """End all streams and free everything, after the step under way in another thread. Safe to call twice."""
        with self._callers:
            self._closed, streams = True, list(self._streams)
        for stream in streams:
            stream.close()
        self._sessions.close()
        self._loaded.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this engine was closed; load another one")


def _without_speculation(step: Step) -> Step:
    return replace(step, stats=replace(step.stats, fallback="speculate=False was given"))
