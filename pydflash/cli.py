"""The command line: ``pydflash demo|generate|chat|info|doctor|explain|convert-draft|bench|ab``.

Text goes to stdout, everything about it to stderr. The engine is imported when a command needs it, so that help is
fast.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from pydflash.atomic_file import check_output
from pydflash.control_chars import escape_controls
from pydflash.errors import PydflashError

if TYPE_CHECKING:
    from pydflash.decode import Stats
    from pydflash.engine import Chunk, Completion, Engine, Prompt
    from pydflash.gguf import GGUFFile
    from pydflash.sampling import SamplingParams
    from pydflash.weights import Progress

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts hold brackets
    help="Run Qwen3.5/3.6-class GGUF models, with a DFlash draft or without.",
)

ACCEPTED_STYLE = "green"
DEMO_PROMPT = '''class SilverRiver:
    """A silver river with level, width, limit and owner."""

    def __init__(self, level: float, width: int, limit: float, owner: str) -> None:
'''
DATA = Path(__file__).with_name("data")
_LINES = "\n\t"
"""The control characters that a text of several lines keeps."""

# --- options, spelled like the parameters -----------------------------------------------------------------------------

Model = Annotated[
    Path, typer.Argument(help="GGUF file of the model; the first part of a split one.", show_default=False)
]
Draft = Annotated[Path | None, typer.Option(help="GGUF file of the DFlash draft.")]
MaxContext = Annotated[int | None, typer.Option(help="Most positions of prompt and output together [4096].")]
CacheK = Annotated[str | None, typer.Option(help="Type of the K cache: f32, f16, bf16, q8_0 or q4_0 [f16].")]
CacheV = Annotated[str | None, typer.Option(help="Type of the V cache [f16].")]
KRotation = Annotated[
    str | None,
    typer.Option(help="Of the K cache: auto, none, hadamard-256, hadamard-128, hadamard-64 or signed-128 [auto]."),
]
VRotation = Annotated[
    str | None, typer.Option(help="Of the V cache: none, hadamard-256, hadamard-128 or hadamard-64 [none].")
]
Fused = Annotated[bool | None, typer.Option(help="Take Q, K and V to attention in one kernel each [yes].")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [auto].")]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU [all].")]
ChunkRows = Annotated[int | None, typer.Option("--chunk", help="Rows of a prefill step [512].")]
DraftMax = Annotated[int | None, typer.Option(help="Most tokens to propose at once [the block less one].")]
Adaptive = Annotated[
    bool | None, typer.Option(help="Choose the length of each proposal from what has paid [on the CPU].")
]
DraftCausal = Annotated[
    bool | None, typer.Option(help="Override what the draft file says of causality [from the file].")
]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the fewest tokens of at least this probability together.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the most likely one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Divide logits of tokens seen; 1 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Subtract for each time a token was seen.")]
PresencePenalty = Annotated[float, typer.Option(help="Subtract once from tokens seen.")]
Seed = Annotated[int | None, typer.Option(help="Of the random draws.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends generation; may be given several times.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Generate past end-of-turn tokens.")]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print what the generation cost.")]

_ENGINE_NAMES = (
    "draft", "max_context", "cache_k", "cache_v", "k_rotation", "v_rotation", "fused", "device", "threads", "chunk",
    "draft_max", "adaptive", "draft_causal",
)  # fmt: skip
_SAMPLING_NAMES = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed",
    "max_tokens", "stop", "ignore_eos",
)  # fmt: skip


# --- commands ---------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Raw prompt; - reads it from stdin.")] = "-",
    draft: Draft = None,
    max_context: MaxContext = None,
    cache_k: CacheK = None,
    cache_v: CacheV = None,
    k_rotation: KRotation = None,
    v_rotation: VRotation = None,
    fused: Fused = None,
    device: Device = None,
    threads: Threads = None,
    chunk: ChunkRows = None,
    draft_max: DraftMax = None,
    adaptive: Adaptive = None,
    draft_causal: DraftCausal = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    seed: Seed = None,
    max_tokens: MaxTokens = 256,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    stats: ShowStats = False,
) -> None:
    """Continue a raw prompt."""
    given = locals()
    params = _params(given)  # before anything is loaded: a wrong value is told at once
    text = sys.stdin.read() if prompt == "-" else prompt
    with _engine(model, given) as engine:
        done = _print_stream(engine, text, params)
        if stats:
            _print_stats(done.stats)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    draft: Draft = None,
    max_context: MaxContext = None,
    cache_k: CacheK = None,
    cache_v: CacheV = None,
    k_rotation: KRotation = None,
    v_rotation: VRotation = None,
    fused: Fused = None,
    device: Device = None,
    threads: Threads = None,
    chunk: ChunkRows = None,
    draft_max: DraftMax = None,
    adaptive: Adaptive = None,
    draft_causal: DraftCausal = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 20,
    top_p: TopP = 0.8,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    seed: Seed = None,
    max_tokens: MaxTokens = 1024,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    stats: ShowStats = False,
) -> None:
    """Talk with a model. Ctrl-D or /quit ends the talk, Ctrl-C an answer. A pasted text is one message."""
    given = locals()
    params = _params(given)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    from pydflash.chat_input import chat_input

    with chat_input() as ask, _engine(model, given) as engine:  # what is typed while the model loads waits too
        while (message := ask()) is not None:
            messages.append({"role": "user", "content": message})
            done = _print_stream(engine, messages, params)
            messages.append({"role": "assistant", "content": done.text})
            if stats:
                _print_stats(done.stats)


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to continue.")] = DEMO_PROMPT,
    max_tokens: MaxTokens = 256,
    device: Device = None,
    threads: Threads = None,
    stats: ShowStats = False,
    model: Annotated[Path, typer.Option(hidden=True)] = DATA / "tiny-target.gguf",
    draft: Annotated[Path, typer.Option(hidden=True)] = DATA / "tiny-draft.gguf",
) -> None:
    """Continue a prompt with the shipped tiny model, with its draft and without, and compare the two."""
    options = {"draft": draft if draft.exists() else None, "device": device, "threads": threads}
    params = _params({"max_tokens": max_tokens})
    with _engine(model, options) as engine:
        if engine.draft is None:
            print(prompt, end="")
            done = _print_stream(engine, prompt, params)
            _note(f"{done.stats.tokens_per_second:.0f} tokens/s; there is no draft at {draft}, so nothing to compare")
            return
        warm = _params({"max_tokens": min(max_tokens, 40)})  # builds every graph, so that no run pays for it
        for speculate in (True, False):
            engine.generate(prompt, warm, speculate=speculate)
        print(prompt, end="")
        with_draft = _print_stream(engine, prompt, params)
        without = engine.generate(prompt, params, speculate=False)
        _compare(with_draft, without)
        if stats:
            _print_stats(with_draft.stats)
    if with_draft.text != without.text:
        _fail("the two texts differ, which must never happen with greedy decoding; please report it")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)],
    check: Annotated[
        bool, typer.Option("--check", help="Read all tensors and look for NaN and infinities; exit code 1 if any.")
    ] = False,
) -> None:
    """Say what a GGUF file holds. Reads its header only, unless --check is given."""
    from pydflash.gguf import GGUFFile

    with GGUFFile.open(file) as opened:
        _print_info(opened)
        if check and not _print_damage(opened):
            raise typer.Exit(1)


def _print_info(opened: GGUFFile) -> None:
    described = opened.describe()
    template = opened.metadata.get("tokenizer.chat_template")
    types = described.pop("types")
    described |= {f"tokenizer {key}": value for key, value in described.pop("tokenizer").items()}
    rows = [(name.replace("_", " "), _plain(value)) for name, value in described.items()]
    _columns(rows)
    print()
    columns = ("tensors", "parameters", "bytes")
    _columns([("type", *columns), *((name, *(f"{entry[c]:,}" for c in columns)) for name, entry in types.items())])
    if template:
        print(f"\nchat template\n{escape_controls(str(template), keep=_LINES)}")


def _print_damage(opened: GGUFFile) -> bool:
    """Print which tensors are damaged; True if none is."""
    from pydflash.gguf_check import damaged_tensors

    with _progress_bar("checking") as progress:
        damaged = list(damaged_tensors(opened, progress))
    if not damaged:
        print(f"\nchecked: no NaN or infinity in {len(opened.tensors):,} tensors")
        return True
    print(f"\ndamaged: {len(damaged):,} of {len(opened.tensors):,} tensors hold NaN or infinities; get the file again")
    rows = [(d.name, d.type.name, f"{d.values:,}", str(list(d.first))) for d in damaged]
    _columns([("tensor", "type", "values", "first index"), *rows])
    return False


@app.command()
def doctor() -> None:
    """Say what was built, what this machine has, and what to do about a difference. Exit code 1 when something is
    wrong.
    """
    from pydflash.doctor import examine

    report = examine()
    _columns(report.facts)
    for problem in report.problems:
        print(f"\nproblem: {escape_controls(problem)}")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[Path | None, typer.Argument(help="GGUF file; without one, only the options.")] = None,
    draft: Draft = None,
    max_context: MaxContext = None,
    cache_k: CacheK = None,
    cache_v: CacheV = None,
    k_rotation: KRotation = None,
    v_rotation: VRotation = None,
    fused: Fused = None,
    device: Device = None,
    threads: Threads = None,
    chunk: ChunkRows = None,
    draft_max: DraftMax = None,
    adaptive: Adaptive = None,
    draft_causal: DraftCausal = None,
) -> None:
    """Print every effective setting and where it came from."""
    given = locals()
    from pydflash.config import EngineConfig, table

    if model is None:
        options = {name: given[name] for name in _ENGINE_NAMES if name != "draft"}
        print(escape_controls(table(EngineConfig.resolve(**options).settings()), keep=_LINES))
        return
    with _engine(model, given) as engine:
        print(escape_controls(engine.explain(), keep=_LINES))


@app.command()
def convert_draft(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and *.safetensors.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="GGUF file to write.", show_default=False)],
    target: Annotated[Path, typer.Option(help="GGUF file of the model the draft is for.", show_default=False)],
    type: Annotated[str, typer.Option(help="Of the matrices: q8_0, q4_0, f16, bf16 or f32.")] = "q8_0",
) -> None:
    """Convert a DFlash draft from Hugging Face's files to GGUF."""
    from pydflash.convert import convert_draft as convert

    with _progress_bar("converting") as progress:
        size = convert(source, output, target=target, type=type, progress=progress)
    _note(f"{output}: {size:,} bytes")


@app.command()
def bench(
    model: Model,
    draft: Draft = None,
    cache_k: CacheK = None,
    cache_v: CacheV = None,
    k_rotation: KRotation = None,
    v_rotation: VRotation = None,
    fused: Fused = None,
    device: Device = None,
    threads: Threads = None,
    chunk: ChunkRows = None,
    draft_max: DraftMax = None,
    draft_causal: DraftCausal = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option("-p", "--prompt-tokens", help="Prefill so many tokens; may be repeated [512]."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Decode so many tokens; 0 for none.")] = 128,
    depth: Annotated[
        list[int] | None, typer.Option("-d", "--depth", help="Decode after so many tokens; may be repeated [0].")
    ] = None,
    repeats: Annotated[int, typer.Option("-r", "--repeats", help="Of each measurement.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Append results to this file, one JSON object a line.")] = None,
) -> None:
    """Measure prefill, decode and, with a draft, its cycles, by llama-bench's definitions."""
    given = locals()
    from pydflash import bench as harness
    from pydflash.config import EngineConfig

    options = {name: given.get(name) for name in _ENGINE_NAMES if name != "draft"}
    plan = harness.Plan(tuple(prompt_tokens or (512,)), max_tokens, tuple(depth or (0,)), repeats)
    with _progress_bar("loading") as progress:
        harness.bench(model, draft, EngineConfig.resolve(**options), plan, json, progress=progress)


@app.command()
def ab(
    model: Model,
    a: Annotated[
        list[str] | None, typer.Option(help="Of arm A: NAME=VALUE,... of what explain lists, or speculate=false.")
    ] = None,
    b: Annotated[list[str] | None, typer.Option(help="Of arm B, likewise; may be given several times.")] = None,
    draft: Draft = None,
    max_context: MaxContext = None,
    cache_k: CacheK = None,
    cache_v: CacheV = None,
    k_rotation: KRotation = None,
    v_rotation: VRotation = None,
    fused: Fused = None,
    device: Device = None,
    threads: Threads = None,
    chunk: ChunkRows = None,
    draft_max: DraftMax = None,
    adaptive: Adaptive = None,
    draft_causal: DraftCausal = None,
    repeats: Annotated[int, typer.Option(help="Pairs of runs; at least 6.")] = 7,
    prompt_tokens: Annotated[int, typer.Option(help="Length of random prompts.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate in each run.")] = 128,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines with a "prompt" each, instead of random ones.')
    ] = None,
    within: Annotated[float | None, typer.Option(help="Margin of equivalence in percent.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything measured to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios of all repeats to this file.")] = None,
) -> None:
    """Compare two configurations: speed with intervals and a noise floor, outputs, acceptance. The other options hold
    for both arms.
    """
    given = locals()
    from pydflash import ab as harness
    from pydflash import ab_report

    options = {name: given.get(name) for name in _ENGINE_NAMES if name != "draft"}
    arms = [harness.parse_arm(n, t or (), options, draft=draft is not None) for n, t in (("A", a), ("B", b))]
    protocol = ab_report.Protocol(repeats, prompt_tokens, max_tokens, prompts, within)
    for path in (json, plot):  # what cannot be written is told before anything is measured
        if path is not None:
            check_output(path, [source for source in (model, draft, prompts) if source is not None])
    if plot is not None:
        ab_report.pyplot()
    with _progress_bar("loading") as progress:
        report = harness.compare(model, draft, arms[0], arms[1], protocol, progress=progress, note=_note)
    print(escape_controls(str(report), keep=_LINES))
    if json is not None:
        report.write_json(json)
    if plot is not None:
        ab_report.plot(report, plot)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line. An error of ours is one line on stderr and exit code 2."""
    try:
        app(args=arguments, prog_name="pydflash")
    except PydflashError as error:
        _fail(str(error))


# --- pieces -----------------------------------------------------------------------------------------------------------


def _params(given: dict[str, Any]) -> SamplingParams:
    from pydflash.sampling import SamplingParams

    values = {name: given[name] for name in _SAMPLING_NAMES if given.get(name) is not None}
    return SamplingParams(**values)


@contextmanager
def _engine(model: Path, given: dict[str, Any]) -> Iterator[Engine]:
    from pydflash.engine import Engine

    options = {name: given.get(name) for name in _ENGINE_NAMES}
    with _progress_bar("loading") as progress:
        engine = Engine.load(model, progress=progress, **options)
    with engine:
        yield engine


@contextmanager
def _progress_bar(what: str) -> Iterator[Progress]:
    """A bar with the time left on stderr, which appears only when there is something to wait for."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, started = bar.add_task(what), False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if done < total and not started:
            started = True
            bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total and started:  # nothing may draw while a command works or measures
            started = False
            bar.stop()

    try:
        yield progress
    finally:
        if started:
            bar.stop()


def _print_stream(engine: Engine, prompt: Prompt, params: SamplingParams) -> Completion:
    """Print text as it comes, proposed and accepted tokens in colour; Ctrl-C ends it early."""
    from pydflash.engine import Completion

    console = Console(highlight=False, markup=False, soft_wrap=True)
    chunks: list[Chunk] = []
    stream = engine.stream(prompt, params)
    try:
        for chunk in stream:
            chunks.append(chunk)
            if console.is_terminal:
                text = Text()
                for piece in chunk.pieces:
                    text.append(escape_controls(piece.text, _LINES), ACCEPTED_STYLE if piece.accepted else None)
                console.print(text, end="")
            else:  # to a file or a pipe goes the text itself, tabs and all
                sys.stdout.write(chunk.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not chunks:
            raise
    print()
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    last = chunks[-1]
    return Completion("".join(c.text for c in chunks), tokens, last.finish_reason or "stop", last.stats)


def _compare(with_draft: Completion, without: Completion) -> None:
    fast, slow = with_draft.stats.tokens_per_second, without.stats.tokens_per_second
    runs = (("with the draft", with_draft.stats), ("without", without.stats))
    rows = [(name, f"{s.tokens_per_second:.0f}", str(s.tokens), str(s.steps)) for name, s in runs]
    _columns([("", "tokens/s", "tokens", "steps"), *rows], sys.stderr)
    speed_up = f"{fast / slow:.2f} times as fast" if slow else "too short to compare"
    same = "the texts are equal" if with_draft.text == without.text else "the texts differ"
    _note(f"{speed_up}, acceptance length {with_draft.stats.acceptance_length:.2f}, {same}")


def _print_stats(stats: Stats) -> None:
    rows = {
        "prompt": f"{stats.prompt_tokens} tokens, {stats.prefill_tokens_per_second:.1f} tokens/s",
        "decode": f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s",
        "cycles": f"{stats.steps}",
        "drafted, accepted": f"{stats.drafted}, {stats.accepted} ({stats.acceptance_rate:.1%})",
        "acceptance length": f"{stats.acceptance_length:.2f}",
        "seconds in draft, verify, accept": (
            f"{stats.draft_seconds:.3f}, {stats.verify_seconds:.3f}, {stats.accept_seconds:.3f}"
        ),
    }
    counts = zip(stats.accepted_per_position, stats.drafted_per_position)
    rates = " ".join(f"{accepted / drafted:.0%}" for accepted, drafted in counts if drafted)
    if rates:
        rows["accepted per position"] = rates
    if stats.fallback:
        rows["without speculation because"] = stats.fallback
    _columns(list(rows.items()), sys.stderr)


def _columns(rows: Sequence[tuple[str, ...]], file: TextIO | None = None) -> None:
    """Rows in columns; the last one keeps its length, whatever the terminal's width."""
    rows = [tuple(map(escape_controls, row)) for row in rows]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, wide)), row[-1]]), file=file or sys.stdout)


def _plain(value: Any) -> str:
    if value is None:
        return "not said"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _note(text: str) -> None:
    print(escape_controls(text), file=sys.stderr)


def _fail(message: str) -> NoReturn:
    _note(f"error: {message}")
    raise SystemExit(2)
