"""The engine: a model, its draft and one sequence behind two calls, ``stream`` and ``generate``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydflash.arguments import an_instance
from pydflash.config import EngineConfig, Setting, Settings, table
from pydflash.decode import Sampler, SamplingParams, Stats, Step, autoregressive, speculative
from pydflash.drafts import CycleCosts, LoadedDraft, ProposalLength, adapts, is_name, load_draft
from pydflash.engine.completion import AnswerText, Chunk, Completion, chunk_of
from pydflash.engine.explain import derived
from pydflash.engine.prompt import Prompt, ids_of, is_conversation, is_given, template_variables
from pydflash.engine.stream import Caller, Stream
from pydflash.errors import ConfigError, PydflashError, SessionClosed, ShapeError, StateError
from pydflash.files import patterns_by_file
from pydflash.models import Model, Progress, load_model
from pydflash.runtime import Session
from pydflash.sampling_params import recommendations
from pydflash.text import (
    SPECIAL,
    ChatTemplate,
    ReasoningSplitter,
    Special,
    Tokenizer,
    encode_messages,
    encode_text,
    has_mark,
    starts_inside,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Engine"]


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
        self._chat_template: ChatTemplate | None = None
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
        bytes_total)`` runs once over the model, then over the draft. A pattern of ``ignore`` has to match something in
        one of the files. Raises ConfigError, LoadError, NoDevice or OutOfMemory; nothing stays allocated then.
        """
        config = EngineConfig.resolve(environment, **settings)
        with ExitStack() as undo:
            files = [path] if draft is None or is_name(draft) else [path, draft]
            ignore, *of_draft = patterns_by_file(config.ignore, files)
            model = undo.enter_context(load_model(path, config.device, progress, threads=config.threads, ignore=ignore))
            loaded = None
            if draft is not None:
                loaded = load_draft(draft, model, progress, causal=config.draft_causal, ignore=sum(of_draft, ()))
                undo.enter_context(closing(loaded))
            engine = cls(model, loaded, config)
            engine._loaded = undo.pop_all()
        with suppress(PydflashError):  # which is for whoever gives messages
            engine._start_chat_template()
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

    @property
    def chat_template(self) -> ChatTemplate:
        """The file's template; TemplateError when it has none or it does not compile, SessionClosed after ``close``."""
        template = self._start_chat_template()
        template.compile()
        return template

    def _start_chat_template(self) -> ChatTemplate:
        """Start its process, unless it is; ``load`` does not wait for it."""
        with self._callers:
            self._check_open()
            if self._chat_template is None:
                template = ChatTemplate.from_metadata(self.model.file.metadata, wait=False)
                self._chat_template = self._loaded.enter_context(template)
            return self._chat_template

    # --- generating -------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        speculate: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        special: Special = "template",
    ) -> Stream:
        """Generate, yielding a Chunk per step. Closing the stream cancels; the engine can be used again at once.

        ``prompt``: text is taken as it is, messages go through the chat template (with ``tools`` and its own
        ``variables``, such as ``{"enable_thinking": False}``), token ids, in a sequence or an array (tokens,), are used
        unchanged. ``speculate`` False leaves a loaded draft aside. ``special``: see :meth:`encode`. Raises ConfigError,
        TemplateError, ShapeError for an empty prompt or wrong ids, ContextFull, SessionClosed, and StateError while
        another thread generates.

        Generation begins with the first chunk that is asked for, which ends a stream that this thread left unfinished;
        a stream that is never read keeps nobody from the engine. A chunk raises NativeError, and the first one
        StateError where another thread has begun to generate since this call.
        """
        self._check_open()
        params = SamplingParams() if params is None else an_instance(params, SamplingParams, "params")
        an_instance(speculate, bool, "speculate")
        ids = self.encode(prompt, tools=tools, variables=variables, special=special)
        self.session.check_prompt(ids, after=0)
        sampler = Sampler(params, self.model.config.vocab)
        stop_ids = self._stop_ids(params)
        caller = Caller()
        text = AnswerText(self.tokenizer, params.stop, self._splitter(prompt, ids))
        stream = Stream(self._stream(ids, params, stop_ids, sampler, speculate, caller, text), caller)
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
        special: Special = "template",
    ) -> Completion:
        """:meth:`stream` to the end, in one piece."""
        options: dict[str, Any] = {"tools": tools, "variables": variables, "special": special}
        with self.stream(prompt, params, speculate=speculate, **options) as stream:
            chunks = list(stream)
        last = chunks[-1] if chunks else Chunk("", (), (), (), Stats())  # closed by another thread before the first
        tokens = tuple(token for chunk in chunks for token in chunk.tokens)
        text = "".join(chunk.text for chunk in chunks)
        reasoning = "".join(chunk.reasoning for chunk in chunks)
        return Completion(text, tokens, last.finish_reason or "cancelled", last.stats, reasoning)

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
        special: Special = "template",
    ) -> list[int]:
        """The token ids that ``stream`` would start from. Raises what it raises for a prompt.

        ``special`` says which texts such as ``<|im_end|>`` become tokens: those that the chat template writes, never
        those inside messages ("template"; in a raw prompt, all), "all", or "none".
        """
        self._check_open()
        special = SPECIAL.check(special, "special")
        ids = ids_of(prompt, self.model.config.vocab)
        if (ids is not None or isinstance(prompt, str)) and (is_given(tools) or is_given(variables)):
            raise ConfigError("tools and variables are for the chat template; give messages instead of a raw prompt")
        if ids is None:
            if isinstance(prompt, str):
                ids = encode_text(self.tokenizer, prompt, special)
            else:
                messages = cast("Sequence[Mapping[str, Any]]", prompt)
                context = self.chat_template.context(messages, tools=tools, **template_variables(variables))
                ids = encode_messages(self.tokenizer, self.chat_template, context, special)
            bos = self.tokenizer.bos_id
            ids = [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids
        if not ids:
            raise ShapeError("the prompt is empty; give at least one token")
        return ids

    def _splitter(self, prompt: Prompt, ids: Sequence[int]) -> ReasoningSplitter | None:
        """Splits an answer to messages, if the template knows of reasoning; the text after a raw prompt stays whole."""
        if not is_conversation(prompt) or not has_mark(self.chat_template.source):
            return None
        return ReasoningSplitter(inside=starts_inside(ids, self.tokenizer))

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a generation. Raises ConfigError for one outside the vocabulary."""
        outside = [token for token in params.stop_token_ids if token >= self.model.config.vocab]
        if outside:
            raise ConfigError(
                f"stop_token_ids names token {outside[0]}; the vocabulary has {self.model.config.vocab:,} tokens"
            )
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.tokenizer.eos_ids)

    def _stream(
        self, ids: list[int], params: SamplingParams, stop_ids: frozenset[int], sampler: Sampler, speculate: bool,
        caller: Caller, text: AnswerText,
    ) -> Generator[Chunk, None, None]:  # fmt: skip
        self._take(caller)
        stats = Stats()
        try:
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

    @cached_property
    def recommended(self) -> Mapping[str, Any]:
        """Sampling that the model file's author recommends (``general.sampling.*``): arguments of SamplingParams.

        ``SamplingParams(**{**engine.recommended, "max_tokens": 512})`` uses them; the engine itself never does.
        """
        return {r.name: r.value for r in recommendations(self.model.file.metadata) if r.name}

    def settings(self) -> tuple[Setting, ...]:
        """Every effective value and where it came from: the configuration, then what follows from it and the files.

        Raises SessionClosed.
        """
        self._check_open()
        most = self.config.draft_max
        return (
            *self.config.settings(),
            *derived(self.session, self.draft, self.draft_session, most, self._adaptive),
            *(Setting(r.label, r.shown, f"model ({r.key})") for r in recommendations(self.model.file.metadata)),
        )

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
