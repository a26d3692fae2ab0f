"""Each cell of the table can be had alone by the command it names; the document changes between its markers only."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from benchmarks.kv_quality import __main__ as command_line
from benchmarks.kv_quality.measure import Caches, Quality, grid
from benchmarks.kv_quality.table import BEGIN, END, Cell, Source, render, write_between_markers
from benchmarks.kv_quality.table import main as write_table
from pydflash.errors import ConfigError
from tests.shipped import DRAFT, TARGET, TEST_DATA, needs_pair


def cell(k: str, v: str, basis: str, kld: float, *recalled: bool, outliers: str = "none") -> Cell:
    recall = tuple((100, i / 2, hit) for i, hit in enumerate(recalled))
    quality = Quality(1000, kld, 10 * kld, 0.5, 2.0, 0.125, recall)
    return Cell(Source("m.gguf", "f32", outliers, "CPU"), Caches(k, v, basis), quality, 3.0, "a command")


def test_every_combination_is_in_the_grid_once() -> None:
    found = grid(["f16", "q4_0"], ["f16", "q8_0"], ["none", "hadamard-256"], ["none", "hadamard-64"])
    assert len(found) == len(set(found)) == 16
    assert found[1] == Caches("f16", "q8_0")
    assert found[-1] == Caches("q4_0", "q8_0", "hadamard-256", "hadamard-64")


def test_the_table_shows_each_cell_where_it_belongs() -> None:
    text = render([
        cell("q4_0", "q4_0", "none", 4.56e-5, True, False, True),
        cell("f16", "q4_0", "none", 0.0123, True, True, True), cell("f16", "f16", "none", 0.0, True, True, True),
    ])  # fmt: skip
    lines = text.splitlines()
    assert "### `m.gguf`, weights as f32, no outliers (CPU)" in lines
    assert lines[lines.index("| K | K basis | V basis | V f16 | V q4_0 |") + 2 :][:2] == [
        "| f16 | none | none | 0 | 0.012 |",
        "| q4_0 | none | none |  | 4.6e-05 |",
    ]
    assert "| f16 | q4_0 | none | none | 0.012 | 0.12 | 50.00 % | 2.000 | 0.12 | 3/3 | 3.00 |" in lines
    assert lines[-3:] == ["| K | V | K basis | V basis | 0.0 | 0.5 | 1.0 |", "|" + " --- |" * 7,
                          "| q4_0 | q4_0 | none | none | 1/1 | 0/1 | 1/1 |"]  # fmt: skip


def test_sources_have_tables_of_their_own() -> None:
    text = render([cell("f16", "f16", "none", 0.0, True), cell("f16", "f16", "none", 0.0, True, outliers="8x32")])
    assert text.count("### ") == 2
    assert text.count("Every cache recalled every needle.") == 2


def test_only_what_stands_between_the_markers_changes(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(document, "new")
    write_between_markers(document, "newer")
    assert document.read_text() == f"before\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"
    document.write_text(f"before\n{END}\n{BEGIN}\n")
    with pytest.raises(ConfigError, match="add them where the table belongs"):
        write_between_markers(document, "new")


def test_a_cell_survives_its_line_of_json() -> None:
    one = cell("q4_0", "q8_0", "signed-128", 0.25, True, False)
    assert Cell.of(json.loads(json.dumps(one.record()))) == one


@needs_pair
def test_the_command_of_a_cell_gives_that_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, again, document = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "x.md"
    options = [str(TARGET), "--draft", str(DRAFT), "--prompts", str(TEST_DATA / "held_out.jsonl")]
    options += ["--contexts", "80,96", "--needles", "2", "--places", "4", "--device", "cpu", "--outliers", "8x32"]
    options += [
        "--cache-k",
        "q4_0",
        "--cache-v",
        "f16,q8_0",
        "--k-rotation",
        "hadamard-256",
        "--v-rotation",
        "none,hadamard-64",
    ]
    command_line.main([*options, "--json", str(results)])
    cells = [Cell.of(json.loads(line)) for line in results.read_text().splitlines()]
    assert [found.caches for found in cells] == grid(
        ["q4_0"], ["f16", "q8_0"], ["hadamard-256"], ["none", "hadamard-64"]
    )
    chosen = cells[-1]
    assert chosen.command in capsys.readouterr().out
    program, *arguments = shlex.split(chosen.command)[2:]
    assert program == "benchmarks.kv_quality"
    command_line.main([*arguments, "--json", str(again)])
    assert [Cell.of(json.loads(line)) for line in again.read_text().splitlines()] == [chosen]
    document.write_text(f"{BEGIN}\n{END}\n")
    write_table([str(results), str(document)])
    assert document.read_text() == f"{BEGIN}\n\n{render(cells)}\n\n{END}\n"
