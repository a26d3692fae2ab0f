"""What an A/B comparison asked, measured and found: for reading, as JSON, and as a picture. ``ab`` fills it in."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from pydflash.config import EngineConfig
from pydflash.errors import ConfigError
from pydflash.files import replacing
from pydflash.measure.verdict import (
    CONFIDENCE,
    Estimate,
    Verdict,
    fewest,
    median_interval,
    noise_floor,
    paired_ratios,
    verdict,
)

__all__ = [
    "ARMS",
    "Acceptance",
    "Arm",
    "Chunks",
    "Fastest",
    "Outcome",
    "Outputs",
    "Protocol",
    "Report",
    "Sample",
    "acceptance",
    "first_difference",
    "outcomes",
    "outputs",
    "runs_of",
]

A, B, AGAIN = "A", "B", "A'"
ARMS = (A, B, AGAIN)


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One side. ``speculate``: whether it uses the draft. ``given``: the settings given for this side, for reading."""

    name: str
    config: EngineConfig
    speculate: bool
    given: Mapping[str, str]

    @property
    def label(self) -> str:
        return f"{self.name}: {', '.join(f'{k}={v}' for k, v in self.given.items()) or 'nothing changed'}"


@dataclass(frozen=True)
class Protocol:
    """How to measure. Raises ConfigError for a value outside its range.

    repeats: pairs of runs. prompt_tokens: length of random prompts. max_tokens: tokens generated in each run.
    prompts: a JSON-lines file whose "prompt" texts are used instead, a different one each repeat.
    within: margin of equivalence in percent. seed: seed of the random prompts.
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


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One run of one arm. ``position``: its place in the order of the repeat. ``decode_seconds``: time of its own
    steps.

    ``chunk``: the most tokens in a chunk of the prompt. ``chunk_seconds``: time of each, ``prefill_seconds`` their sum.
    ``tokens``: the first ``max_tokens`` generated. ``decoded``: all tokens after the first, those of the last cycle
    beyond ``max_tokens`` included, in ``decode_seconds``. The rest is as in ``decode.Stats``.
    """

    arm: str
    repeat: int
    position: int
    prompt_tokens: int
    prefill_seconds: float
    chunk: int
    chunk_seconds: tuple[float, ...]
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

    def pieces(self, rows: int) -> list[tuple[int, float]]:
        """(tokens, seconds) of each ``rows`` tokens of the prompt, a multiple of ``chunk``, and of what is left."""
        each = rows // self.chunk
        seconds = [sum(self.chunk_seconds[i : i + each]) for i in range(0, len(self.chunk_seconds), each)]
        return [(min(rows, self.prompt_tokens - i * rows), piece) for i, piece in enumerate(seconds)]

    @property
    def decode(self) -> float:
        """Tokens after the first per second."""
        return self.decoded / self.decode_seconds

    @property
    def cycle(self) -> float:
        """Milliseconds of a cycle: a target forward and everything around it."""
        return 1e3 * self.decode_seconds / self.cycles


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
class Compared:
    """The medians ``a`` and ``b`` of two arms' values; the ratios B/A and A'/A of the values that belong together, with
    their medians; and the noise floor that A' gives.
    """

    a: float
    b: float
    ratios: list[float]
    ratio: Estimate
    again_ratios: list[float]
    again: Estimate
    noise_floor: float


def _compared(values: Mapping[str, Sequence[float]]) -> Compared:
    a, b = values[A], values[B]
    ratios, again_ratios = paired_ratios(a, b), paired_ratios(a, values[AGAIN])
    ratio, again = median_interval(ratios), median_interval(again_ratios)
    return Compared(statistics.median(a), statistics.median(b), ratios, ratio, again_ratios, again, noise_floor(again))


@dataclass(frozen=True)
class Chunks(Compared):
    """Prefill in lockstep, piece by piece of at most ``tokens``, in tokens/s of a piece.

    Pieces are compared at the same place of the same repeat, all pieces of a repeat before those of the next.
    ``fastest``: tokens/s of the whole prompt if each piece took its fewest seconds of all repeats; None where prompts
    differ in length.
    """

    tokens: int
    fastest: Fastest | None


@dataclass(frozen=True)
class Outcome(Compared):
    """One quantity in ``unit``, compared repeat by repeat, and the fastest runs. The verdict rests on ``chunks`` where
    there are any, else on these medians.
    """

    what: str
    unit: str
    verdict: Verdict
    fastest: Fastest
    chunks: Chunks | None = None


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

    ``order``: the arms of each repeat as they ran. ``in_turn``: the arms did not fit into memory together; otherwise
    they run in lockstep. ``settings``: every effective setting of A and B. ``same_acceptance``: the traces of A and B
    are equal.
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
        """Everything that was measured, as JSON. Raises WriteError."""
        with replacing(path) as file:
            file.write(json.dumps(asdict(self), indent=1, default=str).encode() + b"\n")

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
            lines.append(_medians_line(f"{o.what} {o.unit}", o))
            lines.append(_fastest_line("  fastest run", o.fastest))
            if o.chunks is not None:
                lines.append(_medians_line("  by chunk", o.chunks))
                if o.chunks.fastest is not None:
                    lines.append(_fastest_line("  fastest chunks", o.chunks.fastest))
        lines += [self._confidence(), ""]
        lines += [f"{outcome.what}: {outcome.verdict.text}" for outcome in self.outcomes]
        return "\n".join([*lines, *self._output_lines(), *self._acceptance_lines()])

    def _confidence(self) -> str:
        confidence = f"{100.0 * self.outcomes[0].ratio.confidence:.1f} %"
        chunks = self.outcomes[0].chunks
        if chunks is None:
            return f"medians; intervals hold the median with {confidence} confidence (exact sign test)"
        return (
            f"medians; intervals hold the median with confidence {confidence}, by chunk "
            f"{100.0 * chunks.ratio.confidence:.1f} % (exact sign test)\n"
            f"by chunk: each {chunks.tokens} tokens of a prompt in both arms; the verdict on prefill is from this"
        )

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


def _medians_line(name: str, of: Outcome | Chunks) -> str:
    pairs = "".join(f"{e.median:>10.4f}{f'[{e.low:.4f}, {e.high:.4f}]':>20}" for e in (of.ratio, of.again))
    return f"{name:16}{of.a:>12.2f}{of.b:>12.2f}{pairs}"


def _fastest_line(name: str, of: Fastest) -> str:
    return f"{name:16}{of.a:>12.2f}{of.b:>12.2f}{of.ratio:>10.4f}{'':20}{of.again_ratio:>10.4f}"


def runs_of(samples: Sequence[Sample], arm: str) -> list[Sample]:
    """The runs of one arm, by repeat."""
    return [sample for sample in samples if sample.arm == arm]


def outcomes(samples: Sequence[Sample], within: float | None, cycles: bool, lockstep: bool) -> list[Outcome]:
    """Prefill and decode; milliseconds of a cycle too when both arms speculate. Prefill by chunk in ``lockstep``."""
    quantities: list[tuple[str, str, Callable[[Sample], float], Chunks | None]] = [
        ("prefill", "tok/s", lambda s: s.prefill, _chunks(samples) if lockstep else None),
        ("decode", "tok/s", lambda s: s.decode, None),
    ]
    if cycles:
        quantities.append(("cycle", "ms", lambda s: s.cycle, None))
    return [
        _outcome(what, unit, {arm: [of(s) for s in runs_of(samples, arm)] for arm in ARMS}, within, chunks)
        for what, unit, of, chunks in quantities
    ]


def _outcome(
    what: str, unit: str, values: Mapping[str, Sequence[float]], within: float | None, chunks: Chunks | None = None
) -> Outcome:
    runs = _compared(values)
    shown = chunks or runs
    found = verdict(shown.ratio, shown.noise_floor, within=within, lower_is_better=unit == "ms")
    fastest = _fastest(values, min if unit == "ms" else max)
    return Outcome(**vars(runs), what=what, unit=unit, verdict=found, fastest=fastest, chunks=chunks)


def _chunks(samples: Sequence[Sample]) -> Chunks | None:
    """None where every prompt is read in one piece: the run then says it all."""
    rows = max(s.chunk for s in samples)
    if all(s.prompt_tokens <= rows for s in samples):
        return None
    pieces = {arm: [s.pieces(rows) for s in runs_of(samples, arm)] for arm in ARMS}
    speeds = {arm: [tokens / seconds for run in runs for tokens, seconds in run] for arm, runs in pieces.items()}
    fastest = _fastest_pieces(pieces) if len({s.prompt_tokens for s in samples}) == 1 else None
    return Chunks(**vars(_compared(speeds)), tokens=rows, fastest=fastest)


def _fastest_pieces(pieces: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Fastest:
    """The speed if every piece took its fewest seconds, for arms that read equally many tokens in each repeat."""
    tokens = sum(count for count, _ in pieces[A][0])
    return _fastest({arm: [tokens / sum(min(at)[1] for at in zip(*runs))] for arm, runs in pieces.items()}, max)


def _fastest(values: Mapping[str, Sequence[float]], best: Callable[[Sequence[float]], float]) -> Fastest:
    a, b, again = (best(values[arm]) for arm in ARMS)
    return Fastest(a, b, again, b / a, again / a)


def outputs(samples: Sequence[Sample]) -> Outputs:
    texts = {arm: [sample.tokens for sample in runs_of(samples, arm)] for arm in ARMS}
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


def acceptance(runs: Sequence[Sample]) -> Acceptance:
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
