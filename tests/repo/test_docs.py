"""The documentation keeps up with the code: snippets run, commands parse, what is cited exists, sizes add up."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from pydflash.cli import app, main
from pydflash.kv_format import CACHE_TYPES
from pydflash.native.traits import CPU, CUDA
from tests.shipped import DRAFT, TARGET, needs_pair
from tools.synth.__main__ import TARGETS, draft_geometry
from tools.synth.blocks import TYPES
from tools.synth.layout import Slot, draft_tensors, target_tensors, type_of

ROOT = Path(__file__).parents[2]
DEVICES = {"CPU": CPU, "CUDA": CUDA}
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOG = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("tools/*/*.md")]
    if ".venv" not in path.parts
}

# --- snippets ---------------------------------------------------------------------------------------------------------

SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
STAND_INS = {
    "model.gguf": TARGET,
    "Qwen3.6-27B-Q4_K_M.gguf": TARGET,
    "Qwen3.6-27B-DFlash-q8_0.gguf": DRAFT,
}


def test_the_readme_has_a_snippet_for_the_engine_the_session_and_the_snapshot() -> None:
    assert [name in text for name, text in zip(("Engine.load", ".commit(2)", "Snapshot.load"), SNIPPETS)] == [True] * 3


@needs_pair
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_python_snippet_of_the_readme_runs_as_it_stands(
    snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file in STAND_INS.items():
        (tmp_path / name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYDFLASH_THREADS", "1")
    # The shipped model was trained on 4,096 positions.
    exec(compile(snippet.replace("32_768", "4_096"), "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@needs_pair
def test_the_transcript_of_the_readme_is_what_the_demo_prints(capsys: pytest.CaptureFixture[str]) -> None:
    words, transcript = re.findall(r"^```console\n\$ pydflash (.*?)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0]
    with pytest.raises(SystemExit):
        main(words.split())
    shown = capsys.readouterr()
    text = shown.out.rstrip("\n") + "\n"
    assert transcript.startswith(text)
    speeds = [re.sub(r"\d+", "0", line).split() for line in (transcript.removeprefix(text), shown.err)]
    assert speeds[0] == speeds[1]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every indented command line of every page: the page, and its words. A backslash continues a line."""
    for page, text in PAGES.items():
        for line in re.findall(r"^    (\S.*)", text.replace("\\\n", " "), re.MULTILINE):
            yield page, shlex.split(line, comments=True)


PYDFLASH = [(page, words[1:]) for page, words in commands() if words[:1] == ["pydflash"]]
MODULES = [(page, words[2:]) for page, words in commands() if words[:2] in (["python", "-m"], ["python3", "-m"])]


@pytest.mark.parametrize(("page", "words"), PYDFLASH, ids=[" ".join(words[:2]) for _, words in PYDFLASH])
def test_the_command_line_accepts_every_documented_command(page: str, words: list[str]) -> None:
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize(("page", "words"), MODULES, ids=[" ".join(words[:2]) for _, words in MODULES])
def test_every_documented_module_exists_and_knows_its_options(page: str, words: list[str]) -> None:
    if words[0] == "venv":
        return
    spec = importlib.util.find_spec(words[0])
    assert spec is not None, f"{page}: there is no module {words[0]}"
    assert spec.origin is not None
    source = Path(spec.origin).with_name("__main__.py") if spec.submodule_search_locations else Path(spec.origin)
    text = source.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            positive = word.replace("--no-", "--")
            assert f'"{word}"' in text or f'"{positive}"' in text or word == "--help", (
                f"{page}: {words[0]} has no {word}"
            )


# --- citations --------------------------------------------------------------------------------------------------------


def tracked(suffixes: set[str]) -> Iterator[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    yield from (ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in suffixes)


def test_every_log_entry_that_is_cited_exists() -> None:
    headings = set(re.findall(r"^## (.*)", LOG, re.MULTILINE))
    cited = {}
    for path in tracked({".py", ".c", ".h", ".cu", ".cuh", ".md"}):
        text = re.sub(r"\s+(?:[#*]|//)?\s*", " ", path.read_text(encoding="utf-8"))  # a citation may cross lines
        cited |= dict.fromkeys(re.findall(r'docs/log\.md, "([^"]+)"', text), path.name)
    assert cited
    assert {heading: name for heading, name in cited.items() if heading not in headings} == {}


def test_the_index_of_the_log_lists_every_entry_in_order() -> None:
    headings = re.findall(r"^## (.*)", LOG, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    index = [line for line in LOG.splitlines() if line.startswith("| 20")]
    assert [re.findall(r"\[(.*)\]\(#(.*)\) \|$", line)[0] for line in index] == list(zip(headings, anchors))


def test_every_log_entry_says_what_was_asked_how_it_was_measured_and_what_was_decided() -> None:
    for entry in LOG.split("\n## ")[1:]:
        labels = re.findall(r"^\*\*(\w+)\.\*\*", entry, re.MULTILINE)
        assert labels == ["Question", "Setup", "Decision"], entry.splitlines()[0]


def test_every_file_that_a_page_names_exists() -> None:
    folders = "docs|tools|benchmarks|pydflash|ggml_ext|tests|vendor"
    for page, text in PAGES.items():
        for name in re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]*\.(?:py|md|cu|cuh|c|h|toml|jsonl|gguf))\b", text):
            assert (ROOT / name).exists(), f"{page} names {name}"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_headline_figures_are_those_of_the_performance_page() -> None:
    paragraph = next(p for p in README.split("\n\n") if p.startswith("On one H100"))
    cells = set(re.findall(r"[\d.]+", (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")))
    figures = re.findall(r"\d+\.\d+", paragraph)
    assert len(figures) == 4
    assert set(figures) <= cells


def test_the_memory_table_follows_from_the_geometry() -> None:
    """In GiB, of the geometry that tools/synth writes. A K/V row has one value a head and channel, for K and for V."""
    target = TARGETS["27b"]
    draft = draft_geometry("27b", target)
    attention = target.layers // target.interval
    delta = target.layers - attention
    positions, chunk, pending = 32_768, 512, 16

    def nbytes(kind: str, values: int) -> int:
        return values // TYPES[kind].size * TYPES[kind].nbytes

    def weights(slots: Iterator[Slot], mix: str, layers: int) -> int:
        return sum(nbytes(type_of(slot, mix, layers), math.prod(slot.shape)) for slot in slots)

    def cache(k: str, v: str) -> int:
        width = target.kv_heads * target.head_dim
        return attention * positions * (nbytes(k, width) + nbytes(v, width))

    window = math.ceil((draft.window or 0) / 32) * 32 + 32  # the block's rows beside the window
    slots = [window if sliding else positions for sliding in draft.sliding]
    tape_row = (2 * target.k_heads + target.v_heads) * target.state + 2 * target.v_heads
    sizes = [
        weights(target_tensors(target), "q4_k_m", target.layers),
        weights(draft_tensors(draft), "q8_0", draft.layers),
        cache("f16", "f16"),
        cache("q8_0", "q8_0"),
        cache("q4_0", "q8_0"),
        cache("q4_0", "q4_0"),
        delta * target.v_heads * (target.state + 1) * target.state * 4,
        delta * (target.conv - 1 + pending) * tape_row * 4,
        sum(2 * 2 * draft.kv_heads * draft.head_dim * count for count in slots),
        chunk * len(draft.taps) * target.hidden * 4,
    ]
    table = README.partition("| what | GiB |")[2]
    assert re.findall(r"\| (\d+\.\d\d) \|", table) == [f"{size / 2**30:.2f}" for size in sizes]
    assert re.findall(r"\((\d+) KiB a position\)", table) == [str(size // positions // 1024) for size in sizes[2:6]]


def test_the_page_of_cache_types_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| (CPU(?:, CUDA)?) \|", PAGES["docs/kv-cache.md"], re.MULTILINE)
    assert rows == [
        (name, f"{8 * t.type_size / t.block_size:g}", ", ".join(n for n, d in DEVICES.items() if t in d.cache_types))
        for name, t in CACHE_TYPES.items()
    ]


# --- the test command -------------------------------------------------------------------------------------------------


def test_the_test_command_of_the_readme_is_what_the_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = next(line for line in script.splitlines() if line.startswith("python3 "))
    assert command in README
