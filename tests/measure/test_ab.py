"""``pydflash ab``: its statistics against known answers, its protocol with a clock of our own, its report complete."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from pydflash import cli
from pydflash.config import EngineConfig
from pydflash.decode import Sampler, SamplingParams, Stats, Step
from pydflash.engine import Engine
from pydflash.errors import ConfigError, OutOfMemory
from pydflash.measure import ab, ab_report
from pydflash.measure.ab import compare, parse_arm
from pydflash.measure.ab_report import Arm, Protocol, Report, Sample
from pydflash.measure.bench import WARM_UPS
from pydflash.measure.verdict import Estimate, paired_ratios
from tests.shipped import DRAFT, TARGET, TEST_DATA, needs_pair

OPTIONS = {"device": "cpu", "threads": 1, "max_context": 256}
SHORT = Protocol(repeats=7, prompt_tokens=24, max_tokens=12)
STEPS = 11  # that a run of SHORT takes after the first token


def arms(a: str, b: str, *, draft: bool = False) -> tuple[Arm, Arm]:
    first, second = (
        parse_arm(name, [text], OPTIONS, draft=draft, environment={}) for name, text in (("A", a), ("B", b))
    )
    return first, second


def run(a: str, b: str, protocol: Protocol = SHORT, *, draft: bool = False, clock: Callable[[], float]) -> Report:
    return compare(TARGET, DRAFT if draft else None, *arms(a, b, draft=draft), protocol, clock=clock)


class Clock:
    """Every step of an arm, its prompt included, takes the seconds given for that arm and repeat."""

    def __init__(self, **seconds: Sequence[float]) -> None:
        """``seconds``: of A, B and again (A'); one value a repeat, used in turn."""
        self.seconds = {"A": seconds["A"], "B": seconds["B"], "A'": seconds["again"]}
        self.now, self.reads, self.steps = 0.0, 0, self._steps()

    def _steps(self) -> Iterator[float]:
        """Seconds of each step of SHORT's runs in lockstep."""
        for repeat in itertools.count():
            order = ab.ORDERS[repeat % len(ab.ORDERS)]
            turns = [order, *(ab.turns(order, step) for step in range(STEPS))]
            for name in itertools.chain(*turns):
                yield self.seconds[name][repeat % len(self.seconds[name])]

    def __call__(self) -> float:
        self.reads += 1
        if self.reads % 2 == 0:  # the end of a step
            self.now += next(self.steps)
        return self.now


class FakeEngine:
    """Reads a chunk or yields one token a step and moves the ``clock`` on by what ``seconds`` says of it then."""

    draft = None
    model = SimpleNamespace(config=SimpleNamespace(vocab=1000))

    def __init__(
        self, name: str, log: list[str], clock: list[float], seconds: Callable[[int], float], chunk: int = 32
    ) -> None:
        self.name, self.log, self.clock, self.seconds = name, log, clock, seconds
        self.config = EngineConfig(chunk=chunk)
        self.closed = False

    def reset(self) -> None:
        pass

    def read(self, prompt: Sequence[int]) -> Generator[None, None, Sequence[int]]:
        head = (len(prompt) - 1) // self.config.chunk * self.config.chunk
        for _ in range(0, head, self.config.chunk):
            self.work()
            yield
        return prompt[head:]

    def steps(self, rest: Sequence[int], sampler: Sampler, max_tokens: int, stop_ids: frozenset[int]) -> Iterator[Step]:
        stats = Stats(len(rest), 1)
        try:
            for token in range(max_tokens):
                self.work()
                if token:
                    stats = stats.after(0, 0, (0.0, 0.0, 0.0, 0.0))
                yield Step((token,), stats=stats)
        finally:
            self.closed = True

    def work(self) -> None:
        self.clock[0] += self.seconds(len(self.log))
        self.log.append(self.name)


def fakes(
    seconds: Callable[[int], float], chunks: Sequence[int] = (32, 32, 32)
) -> tuple[list[FakeEngine], list[str], Callable[[], float]]:
    """The three arms, the log of their steps, and the clock they move; ``seconds`` of the n-th step of all."""
    log: list[str] = []
    now = [0.0]
    engines = [FakeEngine(name, log, now, seconds, chunk) for name, chunk in zip(ab_report.ARMS, chunks)]
    return engines, log, lambda: now[0]


STEADY = {"A": (1.0,), "B": (1.0,), "again": (1.0,)}


# --- what can be asked for --------------------------------------------------------------------------------------------


def test_every_setting_of_the_engine_can_be_given() -> None:
    values = {
        "max_context": "64", "threads": "1", "draft_max": "3", "adaptive": "true", "draft_causal": "false",
        "ignore": "blk.*",
    }  # fmt: skip
    for field in dataclasses.fields(EngineConfig):
        if field.name != "sources":
            text = values.get(field.name, str(field.default).lower())
            arm = parse_arm("A", [f"{field.name}={text}"], {}, environment={})
            found = getattr(arm.config, field.name)
            assert str(found[0] if isinstance(found, tuple) else found).lower() == text
            assert arm.config.sources[field.name] == "argument"


def test_settings_come_comma_separated_or_one_by_one_and_win_over_common_ones() -> None:
    texts = ["cache_k=q4_0, k_rotation=none", "speculate=false"]
    arm = parse_arm("B", texts, {"cache_k": "q8_0", "chunk": 64}, draft=True, environment={"PYDFLASH_CACHE_V": "bf16"})
    assert (arm.config.cache_k, arm.config.k_rotation, arm.config.cache_v) == ("q4_0", "none", "bf16")
    assert (arm.config.chunk, arm.speculate) == (64, False)
    assert arm.label == "B: cache_k=q4_0, k_rotation=none, speculate=false"


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("k_rotaion=none", "k_rotation.*speculate"),
        ("k_rotation", "NAME=VALUE"),
        ("sources=x", "max_context"),
        ("k_rotation=hadamard", "auto, none, hadamard-256"),
        ("cache_k=q9", "f16, bf16"),
        ("adaptive=2", "true, yes"),
        ("chunk=many", "32, 64"),
        ("speculate=2", "true, yes"),
        ("speculate=true", "--draft"),
        ("chunk=32,chunk=64", "twice"),
    ],
)
def test_an_unknown_name_or_value_is_an_error_that_lists_the_valid_ones(text: str, listed: str) -> None:
    with pytest.raises(ConfigError, match=listed):
        parse_arm("B", [text], OPTIONS, environment={})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": "a"}\n' * 9, "holds 1 different"),
        ('{"text": "a"}\n' * 9, "prompt"),
        ("not json\n", "JSON lines"),
        ("\n".join(f'{{"prompt": {i}}}' for i in range(9)), "none empty"),
    ],
)
def test_a_file_of_prompts_is_checked(tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match=said):
        Protocol(prompts=path).texts()


# --- lockstep ---------------------------------------------------------------------------------------------------------


def test_arms_advance_step_by_step_in_reversed_order() -> None:
    engines, log, clock = fakes(lambda step: 1.0)
    found = ab.measure(engines, [1, 2], 9, clock)  # type: ignore[arg-type]
    prompts, steps = log[:3], [tuple(log[i : i + 3]) for i in range(3, len(log), 3)]
    assert prompts == ["A", "B", "A'"]
    assert len(steps) == 8
    assert steps[0] == ("A", "B", "A'")
    assert all(steps[i + 1] == steps[i][::-1] for i in range(0, 8, 2))
    assert set(steps[:6]) == set(ab.ORDERS)
    again = [name for name, before in zip(log[4:22], log[3:21]) if name == before]
    assert sorted(again) == sorted(ab_report.ARMS)  # in six steps every arm follows itself once
    for of in found:
        assert (of["prefill_seconds"], of["decode_seconds"], of["decoded"], of["cycles"]) == (1.0, 8.0, 8, 8)
    assert all(engine.closed for engine in engines)


def test_a_drift_within_a_repeat_falls_on_all_arms_alike() -> None:
    """The machine slows down over some steps and recovers, by sixteenths of a second, exact in binary."""

    def seconds(step: int) -> float:
        turn = step - 3  # after the prompts
        return 1.0 + max(0, min(turn - 6, 30 - turn)) / 16

    engines, log, clock = fakes(seconds)
    together = [of["decode_seconds"] for of in ab.measure(engines, [1], 13, clock)]  # type: ignore[arg-type]
    assert len(log) == 3 * 13
    assert together[0] == together[1] == together[2] > 13.0
    assert paired_ratios(together[:1], together[1:2]) == paired_ratios(together[:1], together[2:]) == [1.0]
    engines, _, clock = fakes(seconds)
    apart = [ab.measure([engine], [1], 13, clock)[0]["decode_seconds"] for engine in engines]  # type: ignore[list-item]
    assert len(set(apart)) == 3


def test_an_arm_with_fewer_steps_leaves_the_others_going() -> None:
    """B's steps yield two tokens."""
    engines, log, clock = fakes(lambda step: 1.0)
    single = engines[1].steps
    engines[1].steps = lambda *given: (  # type: ignore[method-assign]
        dataclasses.replace(step, tokens=step.tokens * 2) for step in single(*given)
    )
    found = ab.measure(engines, [1], 8, clock)  # type: ignore[arg-type]
    assert [log.count(name) for name in ab_report.ARMS] == [8, 4, 8]
    assert [of["decode_seconds"] for of in found] == [7.0, 3.0, 7.0]
    assert [len(of["tokens"]) for of in found] == [8, 8, 8]


def test_an_error_in_one_arm_closes_the_streams_of_all() -> None:
    def fails(step: int) -> float:
        if step == 7:
            raise OutOfMemory("in the middle")
        return 1.0

    engines, _, clock = fakes(fails)
    with pytest.raises(OutOfMemory, match="in the middle"):
        ab.measure(engines, [1], 9, clock)  # type: ignore[arg-type]
    assert all(engine.closed for engine in engines)


def test_a_prompt_is_read_chunk_by_chunk_in_reversed_order() -> None:
    engines, log, clock = fakes(lambda step: 1.0 + step / 16)
    found = ab.measure(engines, [1] * (5 * 32 + 7), 2, clock)  # type: ignore[arg-type]
    chunks = [log[i : i + 3] for i in range(0, 18, 3)]
    assert chunks == [ab.turns(ab_report.ARMS, turn) for turn in range(6)]
    assert all(chunks[i + 1] == chunks[i][::-1] for i in range(0, 6, 2))
    assert log[18:] == list(ab_report.ARMS)
    for name, of in zip(ab_report.ARMS, found):
        assert of["chunk_seconds"] == tuple(1.0 + at / 16 for at, who in enumerate(log[:18]) if who == name)
        assert (of["prefill_seconds"], of["chunk"]) == (sum(of["chunk_seconds"]), 32)
    assert len({of["prefill_seconds"] for of in found}) == 1  # a steady drift cancels


def test_a_drift_within_a_prompt_falls_on_all_arms_alike() -> None:
    """The machine slows down over some chunks and recovers; it lasts as long as an arm takes for its prompt."""

    def seconds(step: int) -> float:
        return 1.0 + max(0, min(step - 6, 30 - step)) / 16

    prompt = [1] * (12 * 32)
    engines, _, clock = fakes(seconds)
    together = [of["prefill_seconds"] for of in ab.measure(engines, prompt, 2, clock)]  # type: ignore[arg-type]
    assert together[0] == together[1] == together[2] > 12.0
    engines, log, clock = fakes(seconds)
    apart = []
    for engine in engines:
        apart.append(ab.measure([engine], prompt, 2, clock)[0]["prefill_seconds"])  # type: ignore[list-item]
        log.pop()  # the step after the prompt: the next arm reads at once
    assert max(apart) / min(apart) > 1.4


def test_arms_with_chunks_of_other_sizes_read_as_much_at_a_turn() -> None:
    engines, log, clock = fakes(lambda step: 1.0, (32, 128, 64))
    found = ab.measure(engines, [1] * (2 * 128 + 70), 2, clock)  # type: ignore[arg-type]
    first = ["A"] * 4 + ["B"] + ["A'"] * 2
    last = ["B"] + ["A'"] * 2 + ["A"] * 3  # of 70 tokens
    assert log == [*first, *first[::-1], *last, *ab_report.ARMS]
    assert [len(of["chunk_seconds"]) for of in found] == [11, 3, 6]
    pieces = [Sample(name, 0, 0, **of).pieces(128) for name, of in zip(ab_report.ARMS, found)]
    assert pieces == [
        [(128, 4.0), (128, 4.0), (70, 3.0)],
        [(128, 1.0), (128, 1.0), (70, 1.0)],
        [(128, 2.0), (128, 2.0), (70, 2.0)],
    ]


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """(engine, prompt) of every run, warm-ups included; those of arms in lockstep by their prompts' order."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    measure = ab.measure

    def recorded(engines: Sequence[Engine], prompt: Sequence[int], *rest: object) -> object:
        seen.extend((id(engine), tuple(prompt)) for engine in engines)
        return measure(engines, prompt, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ab, "measure", recorded)
    return seen


@needs_pair
def test_nothing_differs_between_an_arm_and_itself() -> None:
    report = run("", "", clock=Clock(**STEADY))
    for outcome in report.outcomes:
        assert outcome.ratio == outcome.again == Estimate(1.0, 1.0, 1.0, 0.984375)
        assert outcome.verdict.kind == "no difference"
    assert report.outputs.b_differs is report.outputs.again_differs is None
    assert len(set(report.outputs.sha256.values())) == 1
    assert "no difference beyond the noise floor of 0.00 %" in str(report)


@needs_pair
def test_a_slower_arm_is_told_apart_from_noise() -> None:
    noise = (1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0)
    drift = [1.0 + repeat for repeat in range(7)]  # of the machine: larger than what is sought, the same in all arms
    slow = Clock(A=drift, B=[1.25 * seconds for seconds in drift], again=[x * d for x, d in zip(noise, drift)])
    prefill, decode = run("", "", clock=slow).outcomes
    for outcome in (prefill, decode):
        assert outcome.verdict.kind == "slower"
        assert outcome.verdict.text == "B is slower by 20.00 % [20.00, 20.00]"
        assert outcome.noise_floor == pytest.approx(1 / 0.98 - 1)
    assert decode.a == pytest.approx(1 / 4.0)  # the median repeat has steps of 4 s
    assert prefill.a == pytest.approx(24 / 4.0)


@needs_pair
def test_a_long_prompt_is_reported_by_chunk() -> None:
    """72 tokens in chunks of 32; in each repeat one arm's first chunk takes 1 s longer, B's chunks 1/64 longer."""
    protocol = Protocol(repeats=9, prompt_tokens=72, max_tokens=2, within=2.0)
    reads, now = itertools.count(), [0.0]

    def clock() -> float:
        repeat, read = divmod(next(reads), 2 * 4 * 3)  # both ends of three chunks and one step of three arms
        turn, at = divmod(read // 2, 3)
        order = ab.ORDERS[repeat % len(ab.ORDERS)]
        arm = ab.turns(order, turn % 3)[at]
        if read % 2:
            now[0] += (65 / 64 if arm == "B" else 1.0) + (turn == 0 and arm == order[repeat // 3])
        return now[0]

    report = run("chunk=32", "chunk=32", protocol, clock=clock)
    outcome = report.outcomes[0]
    assert outcome.chunks is not None
    assert outcome.chunks.ratio.median == outcome.chunks.fastest.ratio == pytest.approx(64 / 65)
    assert outcome.chunks.fastest.again_ratio == outcome.chunks.again.median == 1.0
    assert outcome.verdict.kind == "within"
    assert [len(of.chunk_seconds) for of in report.samples] == [3] * 27
    lines = str(report).splitlines()
    table = [line for line in lines if line.startswith(("prefill tok/s", "  fastest", "  by chunk"))]
    assert [line[:16].strip() for line in table] == [
        "prefill tok/s", "fastest run", "by chunk", "fastest chunks", "fastest run",
    ]  # fmt: skip
    assert table[3].split()[2:] == ["24.00", "23.63", "0.9846", "1.0000"]
    assert max(map(len, lines[:16])) <= 120
    assert "the verdict on prefill is from this" in str(report)


@needs_pair
def test_arms_in_lockstep_write_what_each_writes_alone() -> None:
    """With drafts, chunks of two sizes and prompts of several: no arm's sequence touches another's."""
    protocol = Protocol(repeats=6, max_tokens=24, prompts=TEST_DATA / "held_out.jsonl")
    report = run("chunk=32", "chunk=64,cache_k=q8_0", protocol, draft=True, clock=Clock(**STEADY))
    texts = protocol.texts()
    for name, options in (("A", {"chunk": 32}), ("B", {"chunk": 64, "cache_k": "q8_0"})):
        samples = ab_report.runs_of(report.samples, name)
        assert max(len(of.chunk_seconds) for of in samples) > 1
        with Engine.load(TARGET, DRAFT, **OPTIONS, **options, adaptive=False, environment={}) as engine:  # type: ignore[arg-type]
            for text, of in zip(texts, samples):
                done = engine.generate(text, SamplingParams(max_tokens=24 + 16, ignore_eos=True))
                assert done.tokens[:24] == of.tokens
                assert tuple(done.stats.trace[: of.cycles]) == of.trace


@needs_pair
def test_the_fastest_run_of_each_arm_is_reported() -> None:
    """Noise slows two runs in three, not the same ones in the arms; B takes 1/64 longer."""
    clock = Clock(A=(1.0, 1.5, 1.25), B=(65 / 32, 65 / 64, 65 / 48), again=(2.0, 1.75, 1.0))
    report = run("", "", clock=clock)
    prefill, decode = report.outcomes
    assert (decode.fastest.a, decode.fastest.b, decode.fastest.again) == (1.0, pytest.approx(64 / 65), 1.0)
    assert (prefill.fastest.a, prefill.fastest.b, prefill.fastest.again) == (24.0, pytest.approx(24 * 64 / 65), 24.0)
    for outcome in (prefill, decode):
        assert outcome.fastest.ratio == pytest.approx(64 / 65)
        assert outcome.fastest.again_ratio == 1.0
    lines = str(report).splitlines()
    assert [line.split() for line in lines if "fastest run" in line] == [
        ["fastest", "run", "24.00", "23.63", "0.9846", "1.0000"],
        ["fastest", "run", "1.00", "0.98", "0.9846", "1.0000"],
    ]
    table = [line for line in lines if line.startswith(("prefill tok/s", "decode tok/s", "  fastest"))]
    assert len(table) == 4
    assert max(map(len, table)) <= 120


def test_of_milliseconds_the_fewest_are_the_fastest() -> None:
    values = {"A": [4.0, 2.0] * 3, "B": [1.0, 8.0] * 3, "A'": [5.0, 4.0] * 3}
    assert ab_report._outcome("cycle", "ms", values, None).fastest == ab_report.Fastest(2.0, 1.0, 4.0, 0.5, 2.0)


@needs_pair
def test_both_orders_are_used_and_prompts_never_repeat(runs: list[tuple[int, tuple[int, ...]]]) -> None:
    report = run("", "k_rotation=none", clock=Clock(**STEADY))
    first = [names.index("A") < names.index("B") for names in report.order]
    assert first == [True, False, True, False, True, False, True]
    assert set(report.order[:6]) == {
        (x, y, z) for x in ab_report.ARMS for y in ab_report.ARMS for z in ab_report.ARMS if len({x, y, z}) == 3
    }
    count = 3 * WARM_UPS
    warm, measured = runs[:count], runs[count:]
    engines = dict(zip(ab_report.ARMS, (engine for engine, _ in warm[::WARM_UPS])))
    assert len(set(engines.values())) == 3
    assert [engine for engine, _ in warm] == [engines[name] for name in ab_report.ARMS for _ in range(WARM_UPS)]
    assert [engine for engine, _ in measured] == [engines[name] for names in report.order for name in names]
    prompts = [prompt for _, prompt in measured]
    assert all(prompts[i] == prompts[i + 1] == prompts[i + 2] for i in range(0, len(prompts), 3))
    assert len({*prompts[::3], *(prompt for _, prompt in warm)}) == 7 + count
    placed = [(sample.arm, sample.position) for sample in report.samples]
    assert placed == [(name, at) for names in report.order for at, name in enumerate(names)]


@needs_pair
def test_weights_are_loaded_once_for_arms_that_differ_in_their_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load_model, load_draft = ab.load_model, ab.load_draft
    monkeypatch.setattr(ab, "load_model", lambda *a, **k: (loads.append("model"), load_model(*a, **k))[1])
    monkeypatch.setattr(ab, "load_draft", lambda *a, **k: (loads.append("draft"), load_draft(*a, **k))[1])
    run("cache_k=q8_0", "chunk=32,draft_max=7", Protocol(6, 8, 3), draft=True, clock=Clock(**STEADY))
    assert loads == ["model", "draft"]
    loads.clear()
    run("threads=1", "threads=2", Protocol(6, 8, 3), clock=Clock(**STEADY))
    assert loads == ["model", "model"]


@needs_pair
def test_arms_that_do_not_fit_together_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine at a time is all the memory there is; the results are those of arms in lockstep."""
    sizes: list[int] = []
    measure = ab.measure
    monkeypatch.setattr(ab, "measure", lambda engines, *rest: (sizes.append(len(engines)), measure(engines, *rest))[1])
    together = run("", "k_rotation=none", clock=Clock(**STEADY))
    assert sizes == [1] * 3 * WARM_UPS + [3] * SHORT.repeats
    sizes.clear()
    open_engines: list[Engine] = []
    share, close = Engine.share, Engine.close

    def scarce(model, draft, config):  # type: ignore[no-untyped-def]
        if open_engines:
            raise OutOfMemory("no room for a second engine")
        open_engines.append(share(model, draft, config))
        return open_engines[-1]

    def closed(engine: Engine) -> None:
        open_engines.clear()
        close(engine)

    monkeypatch.setattr(Engine, "share", scarce)
    monkeypatch.setattr(Engine, "close", closed)
    alone = run("", "k_rotation=none", clock=Clock(**STEADY))
    assert (together.in_turn, alone.in_turn) == (False, True)
    assert set(sizes) == {1}
    assert alone.outputs == together.outputs
    assert alone.outcomes == together.outcomes
    assert "in lockstep" in str(together)
    assert "arms loaded in turn" in str(alone)
    monkeypatch.setattr(Engine, "share", lambda *_: (_ for _ in ()).throw(OutOfMemory("no room at all")))
    with pytest.raises(OutOfMemory, match="no room at all"):
        run("", "", clock=Clock(**STEADY))


@needs_pair
def test_a_context_too_small_for_the_runs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_context of B is 32; .* need 52"):
        run("", "max_context=32", clock=Clock(**STEADY))


# --- outputs and acceptance -------------------------------------------------------------------------------------------


@needs_pair
def test_an_f16_cache_knows_no_difference_between_no_rotation_and_auto() -> None:
    protocol = Protocol(repeats=6, max_tokens=24, prompts=TEST_DATA / "held_out.jsonl")
    report = run("k_rotation=none", "k_rotation=auto", protocol, draft=True, clock=Clock(**STEADY))
    a, b = report.acceptance["A"], report.acceptance["B"]
    assert report.outputs.sha256["A"] == report.outputs.sha256["B"]
    assert report.same_acceptance
    assert a == b
    assert a.accepted == sum(a.trace) == sum(a.accepted_per_position) > 0
    assert a.length == 1 + a.accepted / a.cycles
    assert [outcome.what for outcome in report.outcomes] == ["prefill", "decode", "cycle"]
    assert "outputs: equal" in str(report)
    assert "accepted tokens of every cycle are equal" in str(report)


@needs_pair
def test_fused_and_single_kernels_give_equal_outputs() -> None:
    protocol = Protocol(repeats=6, max_tokens=16, prompts=TEST_DATA / "held_out.jsonl")
    report = run("fused=true", "fused=false", protocol, clock=Clock(**STEADY))
    assert report.outputs.b_differs is None
    values = [{s["name"]: s["value"] for s in report.settings[name]}["fused"] for name in "AB"]
    assert values == [True, False]


@needs_pair
def test_a_draft_changes_no_token_and_only_one_arm_accepts() -> None:
    protocol = Protocol(repeats=6, max_tokens=24, prompts=TEST_DATA / "held_out.jsonl")
    report = run("speculate=false", "", protocol, draft=True, clock=Clock(**STEADY))
    assert report.outputs.b_differs is None
    assert report.acceptance["A"].drafted == 0 < report.acceptance["B"].accepted
    assert not report.same_acceptance
    assert [outcome.what for outcome in report.outcomes] == ["prefill", "decode"]


@needs_pair
def test_the_first_differing_token_is_found() -> None:
    report = run("", "cache_k=q4_0,cache_v=q4_0,k_rotation=none", Protocol(6, 128, 32), clock=Clock(**STEADY))
    assert report.outputs.b_differs is not None
    assert report.outputs.again_differs is None
    assert report.outputs.sha256["A"] == report.outputs.sha256["A'"] != report.outputs.sha256["B"]
    repeat, token = report.outputs.b_differs
    texts = {sample.arm: sample.tokens for sample in report.samples if sample.repeat == repeat}
    assert texts["A"][:token] == texts["B"][:token]
    assert texts["A"][token] != texts["B"][token]
    assert f"outputs: differ, first in repeat {repeat + 1} at token {token}" in str(report)


def test_the_first_difference_of_given_lists() -> None:
    assert ab_report.first_difference([(1, 2), (3, 4)], [(1, 2), (3, 4)]) is None
    assert ab_report.first_difference([(1, 2), (3, 4)], [(1, 2), (3, 5)]) == (1, 1)


# --- what is written --------------------------------------------------------------------------------------------------


@needs_pair
def test_the_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ab.json"
    command = ["ab", str(TARGET), "--a", "k_rotation=none", "--b", "k_rotation=auto", "--b", "cache_v=q8_0"]
    command += ["--draft", str(DRAFT), "--device", "cpu", "--threads", "1", "--max-context", "256", "--repeats", "6"]
    command += ["--prompt-tokens", "24", "--max-tokens", "8", "--within", "0.3", "--json", str(path)]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    captured = capsys.readouterr()
    assert not ended.value.code
    assert "B: k_rotation=auto, cache_v=q8_0" in captured.out
    assert captured.err.count("repeat ") == 6
    found = json.loads(path.read_text())
    assert set(found) == {field.name for field in dataclasses.fields(Report)}
    assert found["date"][:2] == "20"
    assert {"pydflash", "ggml", "CPU"} <= set(found["versions"])
    assert found["protocol"]["within"] == 0.3
    settings = {name: {s["name"]: s["value"] for s in found["settings"][name]} for name in "AB"}
    assert (settings["A"]["cache_v"], settings["B"]["cache_v"]) == ("f16", "q8_0")
    assert "cpu" in settings["A"]["device in use"]
    assert len(found["samples"]) == 18
    for sample in found["samples"]:
        assert sample["prefill_seconds"] > 0 < sample["decode_seconds"]
        assert (len(sample["tokens"]), sample["prompt_tokens"]) == (8, 24)
        assert sum(sample["trace"]) == sample["accepted"]
        assert (len(sample["chunk_seconds"]), sum(sample["chunk_seconds"])) == (1, sample["prefill_seconds"])
    assert len(found["order"]) == 6
    for outcome in found["outcomes"]:
        assert len(outcome["ratios"]) == len(outcome["again_ratios"]) == 6
        fastest = outcome["fastest"]
        assert fastest["ratio"] == fastest["b"] / fastest["a"]
        assert fastest["again_ratio"] == fastest["again"] / fastest["a"]
        assert outcome["verdict"]["text"] in captured.out


@needs_pair
def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ab_report.plot(run("", "", draft=True, clock=Clock(**STEADY)), tmp_path / "ab.png")
    assert (tmp_path / "ab.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_plot_without_matplotlib_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["ab", "none.gguf", "--plot", "out.png"])
    assert ended.value.code == 2
    assert "pip install 'pydflash[bench]'" in capsys.readouterr().err
