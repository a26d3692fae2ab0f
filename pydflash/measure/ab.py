"""Two configurations of one model against each other: speed with intervals and a noise floor, outputs, acceptance.

Weights are loaded once and shared; each arm has its own sessions. A third arm, A', is A once more: how A' differs from
A is the noise of the measurement. Every repeat has a prompt that no other run sees, the same for all arms, and the
order of the arms changes so that A precedes B in every other repeat. What a repeat and its order do to both arms
cancels in the ratio B/A of that repeat; ``verdict`` states what the ratios show.

Arms that fit into memory together run in lockstep: they take turns at a piece of the prompt, then at a step of
decoding, and the time of an arm is that of its own turns. A piece is one chunk of the arm with the largest chunks;
arms with smaller chunks read the same number of tokens in a turn. The device is idle at both ends of a turn: what the
host does before a chunk does not overlap the chunk before it, as it does otherwise. What slows the machine for longer
than a turn then falls on all arms alike, and cancels in the ratio of their times at the same piece or in the same
repeat.

What slows it for a shorter time hits one arm. It never makes anything faster, so the fastest run of each arm, and the
sum of the fastest times at each piece of the prompt over all repeats, stand beside the medians. These have no interval:
they rest on few repeats, and a bootstrap says too little about the smallest of a few values (docs/log.md, "An interval
for prefill by chunk"). The median ratio of all pieces has an exact one, provided that noise hits one piece of a repeat
independently of the next; a slow piece here and there hardly moves it, while it moves the sum of a run. So the verdict
on prefill rests on that ratio wherever it exists: in lockstep, with a prompt of more than one piece. Otherwise, and for
decoding, it rests on the median ratio of the repeats. No measurement influences this choice. For an arm that slows down
along the prompt, the median of the pieces shows what a middle piece loses; the median of the repeats shows the cost of
the whole prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from pydflash.config import EngineConfig, Settings
from pydflash.decode import Sampler, SamplingParams, Stats, Step
from pydflash.doctor import examine
from pydflash.drafts import LoadedDraft, load_draft
from pydflash.engine import Engine
from pydflash.errors import ConfigError, OutOfMemory
from pydflash.limits import EXACT_ROWS
from pydflash.measure import ab_report
from pydflash.measure.ab_report import AGAIN, ARMS, A, Arm, B, Protocol, Report, Sample, runs_of
from pydflash.measure.bench import WARM_UPS, random_ids
from pydflash.models import Model, Progress, load_model
from pydflash.settings import Declaration, Flag, declarations

__all__ = ["ORDERS", "compare", "measure", "parse_arm", "turns"]

T = TypeVar("T")

Clock = Callable[[], float]
"""Seconds, as ``time.perf_counter``."""

ORDERS = ((A, B, AGAIN), (AGAIN, B, A), (A, AGAIN, B), (B, AGAIN, A), (AGAIN, A, B), (B, A, AGAIN))
"""All orders, repeat by repeat: every second one is the reverse of the one before it."""


# --- what is asked for ------------------------------------------------------------------------------------------------

_SPECULATE = Declaration(True, Flag(), "Speculate with the draft.")


def parse_arm(
    name: str,
    texts: Sequence[str],
    options: Settings | None = None,
    *,
    draft: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Arm:
    """An arm from texts like 'cache_k=q4_0,k_rotation=none': settings of EngineConfig, and speculate=true or false.

    ``options``: settings of both arms, which ``texts`` replace. ``draft``: whether there is one; it is then used unless
    speculate=false, with proposals of one length unless adaptive=true. Raises ConfigError for an unknown name or value,
    listing the valid ones.
    """
    where = f"--{name.lower()}"
    known = {**declarations(EngineConfig), "speculate": _SPECULATE}
    given: dict[str, str] = {}
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in known:
            raise ConfigError(f"{where} {part!r}: give NAME=VALUE; valid names are {', '.join(known)}")
        if key in given:
            raise ConfigError(f"{where} sets {key} twice, to {given[key]!r} and {value!r}; give one value")
        given[key] = value
    values: dict[str, Any] = {key: known[key].read(text, f"{where} {key}") for key, text in given.items()}
    speculate = values.pop("speculate", draft)
    if speculate and not draft:
        raise ConfigError(f"{where} asks for speculate=true, which needs a draft; give one with --draft")
    config = EngineConfig.resolve(environment, **cast("Settings", {**(options or {}), **values}))
    if config.adaptive is None:  # proposals whose lengths follow from measured times differ from run to run
        config = replace(config, adaptive=False)
    return Arm(name, config, speculate, given)


class _Source:
    """Random prompts, none twice."""

    def __init__(self, vocab: int, seed: int) -> None:
        self._vocab, self._seed, self._count = vocab, seed, 0

    def draw(self, length: int) -> list[int]:
        self._count += 1
        return random_ids(self._vocab, length, (self._seed, self._count))


# --- what is measured -------------------------------------------------------------------------------------------------


class _Run:
    """A running greedy generation of at least ``enough`` tokens, with every chunk of its prompt and every step timed.

    It ends after a whole cycle: a last proposal cut to fit would need a graph of another width. Nothing runs on the
    device after a chunk, nor after a step, whose tokens are on the host.
    """

    def __init__(self, engine: Engine, prompt: Sequence[int], enough: int, clock: Clock) -> None:
        self._run = self._steps(engine, prompt, enough)
        self.chunk = engine.config.chunk
        self._prompt_tokens, self._enough, self._clock = len(prompt), enough, clock
        self._tokens: list[int] = []
        self._chunk_seconds: list[float] = []
        self._step_seconds: list[float] = []
        self._stats = Stats()

    @staticmethod
    def _steps(engine: Engine, prompt: Sequence[int], enough: int) -> Generator[Step | None, None, None]:
        """None for each chunk of the prompt but the last, then steps."""
        spare = engine.draft.limit + 1 if engine.draft is not None else 0
        greedy = Sampler(SamplingParams(), engine.model.config.vocab)
        engine.reset()
        rest = yield from engine.read(prompt)
        yield from engine.steps(rest, greedy, enough + spare, frozenset())

    def step(self) -> None:
        begin = self._clock()
        step = next(self._run)
        seconds = self._clock() - begin
        (self._step_seconds if self._tokens else self._chunk_seconds).append(seconds)
        if step is not None:
            self._tokens += step.tokens
            self._stats = step.stats

    def read(self, rows: int) -> None:
        """Go on reading the prompt: ``rows`` tokens, a multiple of a chunk, or what is left of it."""
        for _ in range(rows // self.chunk):
            if not self.prefilled:
                self.step()

    @property
    def prefilled(self) -> bool:
        """Whether the first token has been drawn."""
        return bool(self._tokens)

    @property
    def done(self) -> bool:
        return len(self._tokens) >= self._enough

    def found(self) -> dict[str, Any]:
        """The fields of a Sample except its place."""
        stats = self._stats
        return {
            "prompt_tokens": self._prompt_tokens, "prefill_seconds": sum(self._chunk_seconds),
            "chunk": self.chunk, "chunk_seconds": tuple(self._chunk_seconds),
            "decoded": len(self._tokens) - 1, "decode_seconds": sum(self._step_seconds),
            "tokens": tuple(self._tokens[: self._enough]),
            "cycles": stats.steps, "drafted": stats.drafted, "accepted": stats.accepted,
            "drafted_per_position": stats.drafted_per_position,
            "accepted_per_position": stats.accepted_per_position, "trace": stats.trace,
        }  # fmt: skip

    def close(self) -> None:
        self._run.close()


def measure(engines: Sequence[Engine], prompt: Sequence[int], enough: int, clock: Clock) -> list[dict[str, Any]]:
    """Generate at least ``enough`` tokens with each engine, in lockstep; for each, the fields of a Sample except its
    place."""
    with ExitStack() as undo:
        runs = [undo.enter_context(closing(_Run(engine, prompt, enough, clock))) for engine in engines]
        piece = max(run.chunk for run in runs)
        _lockstep(runs, lambda run: run.read(piece), lambda run: run.prefilled)
        _lockstep(runs, lambda run: run.step(), lambda run: run.done)
        return [run.found() for run in runs]


def _lockstep(runs: Sequence[_Run], advance: Callable[[_Run], None], through: Callable[[_Run], bool]) -> None:
    """Let all runs take turns until each has finished."""
    turn = 0
    while not all(map(through, runs)):
        for run in turns(runs, turn):
            if not through(run):
                advance(run)
        turn += 1


def turns(arms: Sequence[T], step: int) -> list[T]:
    """The order of one round of turns: every second one is the reverse of the one before, so that a steady drift
    cancels.

    After such a pair another arm begins. At each reversal an arm follows itself and finds its data in the caches; this
    happens to every arm, one step in six.
    """
    first = step // 2 % len(arms)
    order = [*arms[first:], *arms[:first]]
    return order[::-1] if step % 2 else order


class _Pool:
    """The engines of the arms, warmed up. When memory runs out, sessions and then weights make room for one another."""

    def __init__(self, model: Path, draft: Path | None, progress: Progress | None) -> None:
        self._model, self._draft, self._progress = model, draft, progress
        self.warm: Callable[[Engine], None] = lambda engine: None
        self._models: dict[Any, Model] = {}
        self._drafts: dict[Any, LoadedDraft] = {}
        self._engines: dict[str, Engine] = {}
        self.in_turn = False

    def engine(self, name: str, arm: Arm) -> Engine:
        """Raises OutOfMemory when this arm does not fit alone."""
        rooms: tuple[Callable[[], None] | None, ...] = (None, self._close_engines, self.close)
        for make_room in rooms:
            if make_room is not None:
                make_room()
            try:
                if name not in self._engines:
                    self._engines[name] = self._open(arm)
                return self._engines[name]
            except OutOfMemory as error:
                self.in_turn, failure = True, error
        raise failure

    def model(self, arm: Arm) -> Model:
        """Loaded once for all arms of the same device and threads."""
        key = (arm.config.device, arm.config.threads)
        if key not in self._models:
            self._models[key] = load_model(self._model, arm.config.device, self._progress, threads=arm.config.threads)
        return self._models[key]

    def _open(self, arm: Arm) -> Engine:
        model, draft = self.model(arm), None
        if arm.speculate:
            key = (arm.config.device, arm.config.threads, arm.config.draft_causal)
            if key not in self._drafts:
                path = cast(Path, self._draft)
                self._drafts[key] = load_draft(path, model, self._progress, causal=arm.config.draft_causal)
            draft = self._drafts[key]
        engine = Engine.share(model, draft, arm.config)
        try:
            self.warm(engine)
        except BaseException:
            engine.close()
            raise
        return engine

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def close(self) -> None:
        """Free everything; what is needed later is loaded again."""
        self._close_engines()
        for draft in self._drafts.values():
            draft.close()
        for model in self._models.values():
            model.close()
        self._drafts.clear()
        self._models.clear()


def compare(
    model: Path,
    draft: Path | None,
    a: Arm,
    b: Arm,
    protocol: Protocol | None = None,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    clock: Clock = time.perf_counter,
) -> Report:
    """Measure both arms. ``progress`` runs over files being loaded, ``note`` gets a line after each repeat.

    Raises ConfigError before anything is loaded where it can, LoadError, NoDevice or OutOfMemory.
    """
    protocol = protocol or Protocol()
    texts = protocol.texts()
    if not texts:
        _check_room(protocol.prompt_tokens + protocol.max_tokens, a, b)
    versions = dict(examine().facts)
    arms = dict(zip(ARMS, (a, b, a)))
    order: list[tuple[str, ...]] = [ORDERS[repeat % len(ORDERS)] for repeat in range(protocol.repeats)]
    settings: dict[str, list[dict[str, Any]]] = {}
    with closing(_Pool(model, draft, progress)) as pool:
        source = _Source(pool.model(a).config.vocab, protocol.seed)
        prompts = _prompts(pool.model(a), a, protocol, texts, source)
        _check_room(max(map(len, prompts)) + protocol.max_tokens, a, b)
        pool.warm = partial(_warm, source=source, lengths=set(map(len, prompts)), enough=protocol.max_tokens)
        for name, arm in arms.items():  # an arm that does not fit is found before the first measurement
            settings[name] = [setting._asdict() for setting in pool.engine(name, arm).settings()]
        samples: list[Sample] = []
        for repeat, (names, prompt) in enumerate(zip(order, prompts)):
            groups = [(name,) for name in names] if pool.in_turn else [names]
            for group in groups:
                engines = [pool.engine(name, arms[name]) for name in group]
                for name, found in zip(group, measure(engines, prompt, protocol.max_tokens, clock)):
                    samples.append(Sample(name, repeat, names.index(name), **found))
            if note is not None:
                note(_line(samples[-len(names) :], protocol.repeats))
        in_turn = pool.in_turn
    acceptance = {name: ab_report.acceptance(runs_of(samples, name)) for name in (A, B)}
    return Report(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions,
        model=str(model),
        draft=None if draft is None else str(draft),
        protocol=protocol,
        arms={A: a, B: b},
        settings={name: settings[name] for name in (A, B)},
        in_turn=in_turn,
        order=order,
        outcomes=ab_report.outcomes(samples, protocol.within, a.speculate and b.speculate, lockstep=not in_turn),
        outputs=ab_report.outputs(samples),
        acceptance=acceptance,
        same_acceptance=acceptance[A].trace == acceptance[B].trace,
        samples=samples,
    )


def _prompts(model: Model, arm: Arm, protocol: Protocol, texts: Sequence[str], source: _Source) -> list[list[int]]:
    """Token ids, one list a repeat: of ``texts`` when there are any, else random ones."""
    if not texts:
        return [source.draw(protocol.prompt_tokens) for _ in range(protocol.repeats)]
    with Engine.share(model, None, arm.config) as engine:
        return [engine.encode(text) for text in texts]


def _check_room(tokens: int, *arms: Arm) -> None:
    needed = tokens + EXACT_ROWS  # the last block may reach beyond the requested tokens
    for arm in arms:
        if arm.config.max_context < needed:
            raise ConfigError(
                f"max_context of {arm.name} is {arm.config.max_context:,}; prompt and output need {needed:,}; "
                f"give --max-context {needed}, or fewer tokens"
            )


def _warm(engine: Engine, source: _Source, lengths: set[int], enough: int) -> None:
    """Run every shape that will be measured, so that all graphs are built."""
    for length in sorted(lengths) * WARM_UPS:
        measure([engine], source.draw(length), enough, time.perf_counter)


def _line(run: Sequence[Sample], repeats: int) -> str:
    speeds = ", ".join(f"{s.arm} {s.prefill:.1f} and {s.decode:.1f}" for s in run)
    return f"repeat {run[0].repeat + 1} of {repeats}, tokens/s of prefill and decode: {speeds}"
