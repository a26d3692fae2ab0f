"""Two configurations of one model against each other: speed with intervals and a noise floor, outputs, acceptance.

Weights are loaded once and shared; each arm has sessions of its own. A third arm, A', is A once more: what A' differs
from A is the noise of the measurement. Every repeat has a prompt that no other run sees, the same for all arms, and the
order of the arms changes so that A precedes B in every other repeat. What a repeat and its order do to both arms
cancels in the ratio B/A of that repeat; ``verdict`` states what the ratios show.

Arms that fit into memory together decode in lockstep: after the prompts, read one after the other, each arm advances
one step in turn, and its own steps are its time. What slows the machine for longer than a step then falls on all arms
alike. What slows it for less, or during one prompt, does not cancel, but it never makes a run faster: the fastest run
of each arm stands beside the medians.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from pydflash.bench import WARM_UPS, random_ids
from pydflash.config import EngineConfig, parsed, truth
from pydflash.decode import Stats
from pydflash.doctor import examine
from pydflash.draft import Draft, load_draft
from pydflash.engine import Chunk, Engine
from pydflash.errors import ConfigError, OutOfMemory
from pydflash.models import Model, load_model
from pydflash.ops import EXACT_ROWS
from pydflash.sampling import SamplingParams
from pydflash.verdict import CONFIDENCE, Estimate, Verdict, fewest, median_interval, noise_floor, paired_ratios, verdict
from pydflash.weights import Progress

__all__ = [
    "Acceptance",
    "Arm",
    "Fastest",
    "Outcome",
    "Outputs",
    "Protocol",
    "Report",
    "Sample",
    "compare",
    "parse_arm",
    "plot",
]

T = TypeVar("T")

Clock = Callable[[], float]
"""Seconds, as ``time.perf_counter``."""

A, B, AGAIN = "A", "B", "A'"
ARMS = (A, B, AGAIN)
ORDERS = ((A, B, AGAIN), (AGAIN, B, A), (A, AGAIN, B), (B, AGAIN, A), (AGAIN, A, B), (B, A, AGAIN))
"""All orders, repeat by repeat: each second one is the reverse of the one before."""


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One side. ``speculate``: with the draft. ``given``: what was asked of this side, for reading."""

    name: str
    config: EngineConfig
    speculate: bool
    given: Mapping[str, str]

    @property
    def label(self) -> str:
        return f"{self.name}: {', '.join(f'{k}={v}' for k, v in self.given.items()) or 'nothing changed'}"


def parse_arm(
    name: str,
    texts: Sequence[str],
    options: Mapping[str, Any] | None = None,
    *,
    draft: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Arm:
    """An arm from texts like 'cache_k=q4_0,k_rotation=none': settings of EngineConfig, and speculate=true or false.

    ``options``: settings of both arms, which ``texts`` replace. ``draft``: whether there is one; it is then used unless
    speculate=false. Raises ConfigError for an unknown name or value, listing the valid ones.
    """
    where = f"--{name.lower()}"
    known = [f.name for f in fields(EngineConfig) if f.name != "sources"]
    given: dict[str, str] = {}
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in (*known, "speculate"):
            raise ConfigError(f"{where} {part!r}: give NAME=VALUE; valid names are {', '.join((*known, 'speculate'))}")
        if key in given:
            raise ConfigError(f"{where} sets {key} twice, to {given[key]!r} and {value!r}; give one value")
        given[key] = value
    speculate = truth(f"{where} speculate", given["speculate"]) if "speculate" in given else draft
    if speculate and not draft:
        raise ConfigError(f"{where} asks for speculate=true, which needs a draft; give one with --draft")
    values = {key: parsed(key, f"{where} {key}", value) for key, value in given.items() if key != "speculate"}
    return Arm(name, EngineConfig.resolve(environment, **{**(options or {}), **values}), speculate, given)


@dataclass(frozen=True)
class Protocol:
    """How to measure. Raises ConfigError for a value outside its range.

    repeats: pairs of runs. prompt_tokens: of random prompts. max_tokens: generated in each run.
    prompts: a JSON-lines file whose "prompt" texts are used instead, a different one each repeat.
    within: margin of equivalence in percent. seed: of the random prompts.
    """

    repeats: int = 7
    prompt_tokens: int = 512
    max_tokens: int = 128
    prompts: Path | None = None
    within: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("repeats", fewest()), ("prompt_tokens", 1), ("max_tokens", 2)):
            if getattr(self, name) < least:
                why = f", for an interval of {100 * CONFIDENCE:g} %" if name == "repeats" else ""
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: {least} or more{why}")
        if self.within is not None and not 0.0 < self.within < 100.0:
            raise ConfigError(f"within is {self.within}; allowed: a percentage above 0 and below 100")

    def texts(self) -> list[str]:
        """The prompts of the file, one a repeat; none without a file. Raises ConfigError when it lacks them."""
        if self.prompts is None:
            return []
        try:
            rows = [json.loads(line) for line in self.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
            found = list(dict.fromkeys(row["prompt"] for row in rows))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{self.prompts}: JSON lines with a "prompt" each are needed; {type(error).__name__}: {error}'
            ) from None
        if len(found) < self.repeats or not all(isinstance(text, str) and text for text in found):
            raise ConfigError(
                f"{self.prompts} holds {len(found)} different prompts; {self.repeats} repeats need as many, none empty"
            )
        return found[: self.repeats]


class _Source:
    """Random prompts, none twice."""

    def __init__(self, vocab: int, seed: int) -> None:
        self._vocab, self._seed, self._count = vocab, seed, 0

    def draw(self, length: int) -> list[int]:
        self._count += 1
        return random_ids(self._vocab, length, (self._seed, self._count))


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One run of one arm. ``position``: its place in the order of the repeat. ``decode_seconds``: of its own steps.

    ``tokens``: the first ``max_tokens`` generated. ``decoded``: all tokens after the first, those of the last cycle
    beyond ``max_tokens`` included, in ``decode_seconds``. The rest is of ``decode.Stats``.
    """

    arm: str
    repeat: int
    position: int
    prompt_tokens: int
    prefill_seconds: float
    decoded: int
    decode_seconds: float
    tokens: tuple[int, ...]
    cycles: int
    drafted: int
    accepted: int
    drafted_per_position: tuple[int, ...]
    accepted_per_position: tuple[int, ...]
    trace: tuple[int, ...]

    @property
    def prefill(self) -> float:
        """Prompt tokens per second, until the first token is on the host."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode(self) -> float:
        """Tokens after the first per second."""
        return self.decoded / self.decode_seconds

    @property
    def cycle(self) -> float:
        """Milliseconds of a target forward and all around it."""
        return 1e3 * self.decode_seconds / self.cycles


class _Run:
    """A greedy generation of at least ``enough`` tokens under way, each of its steps timed; the first is the prompt.

    It ends after a whole cycle: a last proposal cut to fit would need a graph of another width. A step leaves nothing
    running on the device, as its tokens are on the host.
    """

    def __init__(self, engine: Engine, prompt: Sequence[int], enough: int, clock: Clock) -> None:
        spare = engine.draft.config.block_size if engine.draft is not None else 0
        params = SamplingParams(max_tokens=enough + spare, ignore_eos=True)
        self._stream = cast("Generator[Chunk, None, None]", engine.stream(prompt, params))
        self._prompt_tokens, self._enough, self._clock = len(prompt), enough, clock
        self._tokens: list[int] = []
        self._seconds: list[float] = []
        self._stats = Stats()

    def step(self) -> None:
        begin = self._clock()
        chunk = next(self._stream)
        self._seconds.append(self._clock() - begin)
        self._tokens += chunk.tokens
        self._stats = chunk.stats

    @property
    def done(self) -> bool:
        return len(self._tokens) >= self._enough

    def found(self) -> dict[str, Any]:
        """The fields of a Sample but its place."""
        stats = self._stats
        return {
            "prompt_tokens": self._prompt_tokens, "prefill_seconds": self._seconds[0],
            "decoded": len(self._tokens) - 1, "decode_seconds": sum(self._seconds[1:]),
            "tokens": tuple(self._tokens[: self._enough]),
            "cycles": stats.steps, "drafted": stats.drafted, "accepted": stats.accepted,
            "drafted_per_position": tuple(stats.drafted_per_position),
            "accepted_per_position": tuple(stats.accepted_per_position), "trace": tuple(stats.trace),
        }  # fmt: skip

    def close(self) -> None:
        self._stream.close()


def measure(engines: Sequence[Engine], prompt: Sequence[int], enough: int, clock: Clock) -> list[dict[str, Any]]:
    """Generate at least ``enough`` tokens with each engine, in lockstep; the fields of a Sample but its place, each."""
    with ExitStack() as undo:
        runs = [undo.enter_context(closing(_Run(engine, prompt, enough, clock))) for engine in engines]
        for run in runs:
            run.step()
        step = 0
        while not all(run.done for run in runs):
            for run in turns(runs, step):
                if not run.done:
                    run.step()
            step += 1
        return [run.found() for run in runs]


def turns(arms: Sequence[T], step: int) -> list[T]:
    """The order of one step: each second one is the reverse of the one before, so that a steady drift cancels.

    After such a pair another arm begins. At each reversal an arm follows itself and finds its data in the caches; so
    every arm does, one step in six.
    """
    first = step // 2 % len(arms)
    order = [*arms[first:], *arms[:first]]
    return order[::-1] if step % 2 else order


class _Pool:
    """The engines of the arms, warmed up. Where memory ends, sessions and then weights make room for one another."""

    def __init__(self, model: Path, draft: Path | None, progress: Progress | None) -> None:
        self._model, self._draft, self._progress = model, draft, progress
        self.warm: Callable[[Engine], None] = lambda engine: None
        self._models: dict[Any, Model] = {}
        self._drafts: dict[Any, Draft] = {}
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
        """Free everything; what is asked for later is loaded again."""
        self._close_engines()
        for draft in self._drafts.values():
            draft.close()
        for model in self._models.values():
            model.close()
        self._drafts.clear()
        self._models.clear()


# --- what is found ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fastest:
    """The best value of each arm over all repeats, and the ratios of these."""

    a: float
    b: float
    again: float
    ratio: float
    again_ratio: float


@dataclass(frozen=True)
class Outcome:
    """One quantity: the arms' medians in ``unit``, the ratios of each repeat with their medians, the verdict from them,
    and the fastest runs.
    """

    what: str
    unit: str
    a: float
    b: float
    ratios: list[float]
    ratio: Estimate
    again_ratios: list[float]
    again: Estimate
    noise_floor: float
    verdict: Verdict
    fastest: Fastest


@dataclass(frozen=True)
class Outputs:
    """sha256 of each arm's token ids (int32, all repeats in order), and where the first difference from A lies:
    (repeat, token), both from 0, or None.
    """

    sha256: dict[str, str]
    b_differs: tuple[int, int] | None
    again_differs: tuple[int, int] | None


@dataclass(frozen=True)
class Acceptance:
    """Proposals of one arm over all repeats. ``length``: tokens a verify. ``trace``: accepted tokens of each cycle."""

    cycles: int
    drafted: int
    accepted: int
    length: float
    drafted_per_position: list[int]
    accepted_per_position: list[int]
    trace: list[int]


@dataclass(frozen=True)
class Report:
    """Everything that was asked, used and found; ``str()`` for reading, ``asdict`` for JSON.

    ``order``: the arms of each repeat as they ran. ``in_turn``: the arms did not fit into memory together; else they
    decode in lockstep. ``settings``: every effective setting of A and B. ``same_acceptance``: the traces of A and B are
    equal.
    """

    date: str
    versions: dict[str, str]
    model: str
    draft: str | None
    protocol: Protocol
    arms: dict[str, Arm]
    settings: dict[str, list[dict[str, Any]]]
    in_turn: bool
    order: list[tuple[str, ...]]
    outcomes: list[Outcome]
    outputs: Outputs
    acceptance: dict[str, Acceptance]
    same_acceptance: bool
    samples: list[Sample] = field(repr=False)

    @property
    def device(self) -> str:
        found = (s["value"] for settings in self.settings.values() for s in settings if s["name"] == "device in use")
        return ", ".join(dict.fromkeys(found))

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        protocol = self.protocol
        prompt = str(protocol.prompts) if protocol.prompts else f"{protocol.prompt_tokens} random tokens"
        lines = [
            *(arm.label for arm in self.arms.values()),
            f"{self.model} on {self.device}" + (f", draft {self.draft}" if self.draft else ""),
            f"{protocol.repeats} repeats in changing order, prompt {prompt}, {protocol.max_tokens} tokens generated"
            + ("; arms loaded in turn, as they do not fit into memory together" if self.in_turn else "; in lockstep"),
            "",
            f"{'':16}{'A':>12}{'B':>12}{'B/A':>10}{'interval':>20}{AGAIN + '/A':>10}{'interval':>20}",
        ]
        for o in self.outcomes:
            pairs = "".join(f"{e.median:>10.4f}{f'[{e.low:.4f}, {e.high:.4f}]':>20}" for e in (o.ratio, o.again))
            lines.append(f"{o.what + ' ' + o.unit:16}{o.a:>12.2f}{o.b:>12.2f}{pairs}")
            f = o.fastest
            lines.append(f"{'  fastest run':16}{f.a:>12.2f}{f.b:>12.2f}{f.ratio:>10.4f}{'':20}{f.again_ratio:>10.4f}")
        confidence = 100.0 * self.outcomes[0].ratio.confidence
        lines += [f"medians; intervals hold the median with {confidence:.1f} % confidence (exact sign test)", ""]
        lines += [f"{outcome.what}: {outcome.verdict.text}" for outcome in self.outcomes]
        return "\n".join([*lines, *self._output_lines(), *self._acceptance_lines()])

    def _output_lines(self) -> list[str]:
        outputs = self.outputs
        if outputs.b_differs is None:
            lines = [f"outputs: equal, sha256 {outputs.sha256[A]}"]
        else:
            repeat, token = outputs.b_differs
            lines = [
                f"outputs: differ, first in repeat {repeat + 1} at token {token}",
                *(f"  {name} sha256 {outputs.sha256[name]}" for name in (A, B)),
            ]
        if outputs.again_differs is not None:
            repeat, token = outputs.again_differs
            lines.append(f"  A does not repeat its own output: repeat {repeat + 1}, token {token}")
        return lines

    def _acceptance_lines(self) -> list[str]:
        speculating = {name: found for name, found in self.acceptance.items() if found.drafted}
        if not speculating:
            return []
        lines = []
        for name, found in speculating.items():
            rates = [f"{a / d:.0%}" for a, d in zip(found.accepted_per_position, found.drafted_per_position) if d]
            lines.append(
                f"  {name}: {found.cycles} cycles, {found.drafted} drafted, {found.accepted} accepted, "
                f"acceptance length {found.length:.3f}, per position {' '.join(rates)}"
            )
        same = "accepted tokens of every cycle are equal" if self.same_acceptance else "the arms accept differently"
        return [f"acceptance: {same}" if len(speculating) == 2 else "acceptance:", *lines]


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
        for name, arm in arms.items():  # what does not fit is known before the first measurement
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
    acceptance = {name: _acceptance(_of(samples, name)) for name in (A, B)}
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
        outcomes=_outcomes(samples, protocol.within, a.speculate and b.speculate),
        outputs=_outputs(samples),
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
    needed = tokens + EXACT_ROWS  # the last block may reach beyond the tokens asked for
    for arm in arms:
        if arm.config.max_context < needed:
            raise ConfigError(
                f"max_context of {arm.name} is {arm.config.max_context:,}; prompt and output need {needed:,}; "
                f"give --max-context {needed}, or fewer tokens"
            )


def _warm(engine: Engine, source: _Source, lengths: set[int], enough: int) -> None:
    """Run every shape that will be measured, so that all graphs are there."""
    for length in sorted(lengths) * WARM_UPS:
        measure([engine], source.draw(length), enough, time.perf_counter)


def _line(run: Sequence[Sample], repeats: int) -> str:
    speeds = ", ".join(f"{s.arm} {s.prefill:.1f} and {s.decode:.1f}" for s in run)
    return f"repeat {run[0].repeat + 1} of {repeats}, tokens/s of prefill and decode: {speeds}"


def _of(samples: Sequence[Sample], arm: str) -> list[Sample]:
    """The runs of one arm, by repeat."""
    return [sample for sample in samples if sample.arm == arm]


def _outcomes(samples: Sequence[Sample], within: float | None, cycles: bool) -> list[Outcome]:
    """Prefill and decode; milliseconds of a cycle too when both arms speculate."""
    quantities: list[tuple[str, str, Callable[[Sample], float]]] = [
        ("prefill", "tok/s", lambda s: s.prefill),
        ("decode", "tok/s", lambda s: s.decode),
    ]
    if cycles:
        quantities.append(("cycle", "ms", lambda s: s.cycle))
    return [
        _outcome(what, unit, {arm: [of(s) for s in _of(samples, arm)] for arm in ARMS}, within)
        for what, unit, of in quantities
    ]


def _outcome(what: str, unit: str, values: Mapping[str, Sequence[float]], within: float | None) -> Outcome:
    a, b = values[A], values[B]
    ratios, again_ratios = paired_ratios(a, b), paired_ratios(a, values[AGAIN])
    ratio, noise = median_interval(ratios), median_interval(again_ratios)
    floor = noise_floor(noise)
    found = verdict(ratio, floor, within=within, lower_is_better=unit == "ms")
    medians = statistics.median(a), statistics.median(b)
    fastest = _fastest(values, min if unit == "ms" else max)
    return Outcome(what, unit, *medians, ratios, ratio, again_ratios, noise, floor, found, fastest)


def _fastest(values: Mapping[str, Sequence[float]], best: Callable[[Sequence[float]], float]) -> Fastest:
    a, b, again = (best(values[arm]) for arm in ARMS)
    return Fastest(a, b, again, b / a, again / a)


def _outputs(samples: Sequence[Sample]) -> Outputs:
    texts = {arm: [sample.tokens for sample in _of(samples, arm)] for arm in ARMS}
    joined = {arm: [token for tokens in runs for token in tokens] for arm, runs in texts.items()}
    return Outputs(
        {arm: hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest() for arm, ids in joined.items()},
        first_difference(texts[A], texts[B]),
        first_difference(texts[A], texts[AGAIN]),
    )


def first_difference(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """(repeat, token) of the first difference between two lists of equally long outputs, or None."""
    pairs = ((r, t) for r, (x, y) in enumerate(zip(a, b, strict=True)) for t in range(len(x)) if x[t] != y[t])
    return next(pairs, None)


def _acceptance(runs: Sequence[Sample]) -> Acceptance:
    cycles, drafted, accepted = (sum(getattr(s, name) for s in runs) for name in ("cycles", "drafted", "accepted"))
    return Acceptance(
        cycles=cycles,
        drafted=drafted,
        accepted=accepted,
        length=(accepted + cycles) / cycles,
        drafted_per_position=_column_sums([s.drafted_per_position for s in runs]),
        accepted_per_position=_column_sums([s.accepted_per_position for s in runs]),
        trace=[count for s in runs for count in s.trace],
    )


def _column_sums(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]


# --- the picture ------------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files. Raises ConfigError when it is not installed."""
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]

        matplotlib.use("Agg")
        from matplotlib import pyplot as found  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed; run pip install 'pydflash[bench]'"
        ) from None
    return found


def plot(report: Report, path: Path) -> None:
    """Draw the ratios of every repeat, their medians and intervals, B/A beside A'/A, one panel a quantity."""
    outcomes = report.outcomes
    figure, panels = pyplot().subplots(1, len(outcomes), figsize=(4.5 * len(outcomes), 4), squeeze=False)
    for axes, outcome in zip(panels[0], outcomes):
        for x, (ratios, estimate) in enumerate(
            ((outcome.ratios, outcome.ratio), (outcome.again_ratios, outcome.again))
        ):
            percents = [100.0 * (ratio - 1.0) for ratio in ratios]
            low, median, high = (100.0 * (r - 1.0) for r in (estimate.low, estimate.median, estimate.high))
            axes.plot([x - 0.15] * len(percents), percents, "o", color="gray", alpha=0.6)
            axes.errorbar([x], [median], [[median - low], [high - median]], fmt="s", capsize=6)
        axes.axhline(0.0, linewidth=0.8, color="black")
        axes.set_xticks([0, 1], ["B/A", "A'/A"])
        axes.set_xlim(-0.6, 1.6)
        axes.set(title=f"{outcome.what} ({outcome.unit})", ylabel="difference from A in %")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("\n".join(arm.label for arm in report.arms.values()), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
