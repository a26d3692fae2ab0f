"""The command line prints what it promises, where it promises, and answers errors with one line."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pydflash import cli, doctor
from pydflash.cli.show import print_stream
from pydflash.config import EngineConfig
from pydflash.decode import SamplingParams
from pydflash.engine import Engine
from pydflash.files import GGUFFile, TensorSource, write_gguf
from pydflash.ggml_types import GGMLType

COMMANDS = ("demo", "generate", "chat", "info", "doctor", "explain", "convert-draft", "bench", "ab")
PROMPT = "the cat sat on"


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def command(*arguments: str | Path, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = exit_.value.code
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    return command


def test_help_lists_every_command(run) -> None:  # type: ignore[no-untyped-def]
    ran = run("--help")
    assert ran.code == 0
    assert all(name in ran.out for name in COMMANDS)


def test_generate_prints_the_text_of_the_engine_and_nothing_else(run, engine: Engine, target_path: Path) -> None:  # type: ignore[no-untyped-def]
    expected = engine.generate(PROMPT, SamplingParams(max_tokens=20)).text
    common = ("--max-tokens", "20", "--threads", "1", "--device", "cpu")
    for ran in (run("generate", target_path, PROMPT, *common), run("generate", target_path, *common, stdin=PROMPT)):
        assert (ran.code, ran.out, ran.err) == (0, expected + "\n", "")


def test_every_option_has_its_name(run, target_path: Path, draft_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = {
        "draft": draft_path, "max-context": 256, "cache-k": "q4_0", "cache-v": "q8_0", "k-rotation": "none",
        "device": "cpu", "threads": 1, "chunk": 32, "draft-max": 3,
        "temperature": 0.8, "top-k": 40, "top-p": 0.9, "min-p": 0.01,
        "repetition-penalty": 1.1, "frequency-penalty": 0.1, "presence-penalty": 0.1, "seed": 3, "max-tokens": 12,
        "stop": "zzzz",
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    ran = run("generate", target_path, PROMPT, *flags, "--adaptive", "--no-draft-causal", "--ignore-eos", "--stats")
    assert ran.code == 0
    for word in ("cycles", "drafted, accepted", "acceptance length", "seconds in draft, verify, accept", "tokens/s"):
        assert word in ran.err


def test_control_tokens_of_a_prompt_are_read_as_asked(run, engine: Engine, target_path: Path) -> None:  # type: ignore[no-untyped-def]
    prompt, common = "<|im_start|>user<think>", ("--max-tokens", "9", "--threads", "1", "--device", "cpu", "--stats")
    for special in ("template", "all", "none"):
        ids = engine.encode(prompt, special=special)  # type: ignore[arg-type]
        ran = run("generate", target_path, prompt, "--special", special, *common)
        assert ran.out == engine.generate(ids, SamplingParams(max_tokens=9)).text + "\n"
        assert re.search(rf"^prompt +{len(ids)} tokens", ran.err, re.MULTILINE)
    ran = run("generate", target_path, prompt, "--special", "some")
    assert (ran.code, ran.out) == (2, "")
    assert "--special is 'some'; valid values are template, all, none" in ran.err


@pytest.mark.parametrize("command", ["generate", "chat", "explain", "ab", "bench"])
def test_every_setting_of_the_engine_is_an_option(run, command: str) -> None:  # type: ignore[no-untyped-def]
    left_out = {"bench": {"max_context", "adaptive"}}.get(command, set())  # each measurement chooses its own
    text = run(command, "--help").out
    for name in {field.name for field in dataclasses.fields(EngineConfig)} - {"sources"} - left_out:
        assert f"--{name.replace('_', '-')} " in text


@pytest.mark.parametrize(("stdin", "prompts"), [("hi\nand?\n", 3), ("hi\n\n   \nand?\n", 5), ("hi\n/quit\nno\n", 2)])
def test_chat_answers_until_the_input_ends(run, target_path: Path, stdin: str, prompts: int) -> None:  # type: ignore[no-untyped-def]
    options = ("--system", "be brief", "--max-tokens", "4", "--threads", "1", "--temperature", "0")
    ran = run("chat", target_path, *options, stdin=stdin)
    assert ran.code == 0
    assert ran.out.count("> ") == prompts


def test_demo_compares_both_ways_of_decoding(run, target_path: Path, draft_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = ("--model", target_path, "--max-tokens", "24", "--threads", "1", "--device", "cpu")
    ran = run("demo", *options, "--draft", draft_path, "--stats")
    assert ran.code == 0
    assert ran.out.strip()
    for word in ("with the draft", "without", "times as fast", "acceptance length", "the texts are equal"):
        assert word in ran.err
    alone = run("demo", *options, "--draft", draft_path.with_name("none.gguf"))
    assert (alone.code, alone.out) == (0, ran.out)
    assert "tokens/s" in alone.err


def test_accepted_tokens_are_coloured_on_a_terminal(
    speculating: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    done = print_stream(speculating, PROMPT, params)
    out = capsys.readouterr().out
    assert ("\x1b[32m" in out) == (done.stats.accepted > 0)


def test_info_describes_a_file_without_loading_it(run, target_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("info", target_path)
    assert ran.code == 0
    for word in ("qwen35", "Q8_0", "F32", "parameters", "chat template", "<|im_start|>"):
        assert word in ran.out


@pytest.fixture
def hostile_path(tmp_path: Path) -> Path:
    """A file whose name, architecture, template and a tensor would move the cursor; and bytes that are not UTF-8."""
    metadata = {
        "general.architecture": "qwen35\x1b[2J",
        "general.name": "innocent\r\x1b]0;owned\x07\nbytes  1\udce9",
        "tokenizer.chat_template": "{# \x9b31m \x08\x08 #}\n{%- for m in messages %}\n\t{{ m.content }}\n{%- endfor %}",
    }
    values = np.full(64, np.nan, np.float32)
    names = ("plain", "blk.0.\x1b[1A.weight")
    tensors = [TensorSource(n, (64,), GGMLType.F32, lambda: [values.view(np.uint8)]) for n in names]
    path = tmp_path / "hostile.gguf"
    write_gguf(path, metadata, tensors)
    return path


def test_info_spells_control_characters_of_a_file(run, hostile_path: Path) -> None:  # type: ignore[no-untyped-def]
    for options in ((), ("--check",)):
        ran = run("info", hostile_path, *options)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", ran.out + ran.err)
        assert r"qwen35\x1b[2J" in ran.out
        assert r"innocent\r\x1b]0;owned\x07\nbytes  1\xe9" in ran.out
        assert "{# \\x9b31m \\x08\\x08 #}\n{%- for m in messages %}\n\t{{ m.content }}\n{%- endfor %}\n" in ran.out
    assert r"blk.0.\x1b[1A.weight" in ran.out


def test_errors_spell_control_characters_of_a_file(run, hostile_path: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    renamed = hostile_path.rename(tmp_path / "a\x1b[2Jb\nc.gguf")
    for arguments in (
        ("generate", renamed, "x"),
        ("explain", renamed),
        ("info", f"{renamed}x"),
        ("demo", "--model", renamed),
    ):
        ran = run(*arguments)
        assert ran.code == 2
        assert r"a\x1b[2Jb\nc.gguf" in ran.err
        assert "\x1b" not in ran.err
        assert ran.err.count("\n") == 1


def test_check_tells_damaged_weights_from_whole_ones(run, target_path: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("info", "--check", target_path)
    assert ran.code == 0
    assert "no NaN or infinity" in ran.out
    assert "damaged" not in ran.out
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(target_path.read_bytes())
    with GGUFFile.open(target_path) as file:
        info = file.tensors["blk.1.ffn_up.weight"]
    assert info.type == GGMLType.Q8_0
    with damaged.open("r+b") as out:
        for block in (5, 6):
            out.seek(info.offset + block * info.type.type_size)
            out.write(np.array([np.inf], "<f2").tobytes())
    ran = run("info", "--check", damaged)
    assert ran.code == 1
    (line,) = [line for line in ran.out.splitlines() if "blk." in line]
    assert line.split(maxsplit=3) == ["blk.1.ffn_up.weight", "Q8_0", "64", str([0, 160])]
    assert "damaged: 1 of" in ran.out


def test_a_warning_is_one_line_on_stderr(run, target_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("explain", target_path, "--max-context", "5000", "--threads", "1")
    assert ran.code == 0
    assert [line.split(";")[0] for line in ran.err.splitlines()] == ["warning: max_context is 5,000"]


def test_an_option_says_what_may_stay_unused(run, target_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("explain", target_path, "--ignore", "blk.9.*", "--ignore", "x", "--threads", "1")
    assert ran.code == 2
    assert ran.err.startswith("error: ignore has 'blk.9.*', which matches nothing in ")


def test_explain_prints_values_and_sources(
    run,  # type: ignore[no-untyped-def]
    target_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYDFLASH_CACHE_V", "q8_0")
    options = run("explain", "--cache-k", "q4_0")
    loaded = run("explain", target_path, "--cache-k", "q4_0", "--threads", "1")
    for ran in (options, loaded):
        lines = {line.split()[0]: line for line in ran.out.splitlines()}
        assert "argument" in lines["cache_k"]
        assert "PYDFLASH_CACHE_V" in lines["cache_v"]
    assert "K basis" not in options.out
    assert "K basis" in loaded.out


def test_doctor_tells_build_and_machine_apart(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    ran = run("doctor")
    assert ran.code in (0, 1)
    assert (ran.code == 1) == ("problem:" in ran.out)
    for word in ("built with CUDA", "CUDA devices", "threads", "GiB free"):
        assert word in ran.out
    monkeypatch.setattr(doctor, "_nvidia_gpu", lambda: True)
    if "built with CUDA                OFF" in ran.out:
        ran = run("doctor")
        assert ran.code == 1
        assert "PYDFLASH_CUDA=ON" in ran.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "none.gguf", "x"), "none.gguf"),
        (("generate", "{target}", "x", "--temperature", "-1"), "temperature"),
        (("generate", "{target}", "x", "--cache-k", "q9"), "--cache-k"),
        (("generate", "{target}", "x", "--device", "cuda:77"), "cuda:77"),
        (("generate", "{draft}", "x"), "dflash"),
        (("generate", "{target}", ""), "empty"),
        (("info", "{folder}"), "not a regular file"),
        (("explain", "--chunk", "17"), "chunk"),
        (("demo", "--model", "none.gguf"), "none.gguf"),
        (("ab", "{target}", "--a", "k_rotaion=none"), "k_rotation"),
        (("ab", "{target}", "--repeats", "3"), "6 or more"),
        (("ab", "{target}", "--max-context", "64"), "--max-context"),
        (("ab", "{target}", "--json", "none/out.json"), "no folder"),
        (("bench", "none.gguf"), "none.gguf"),
        (("bench", "{target}", "--repeats", "0"), "repeats"),
        (("ab", "{target}", "--json", "{target}"), "is the input"),
        (("ab", "{target}", "--draft", "{draft}", "--plot", "{draft}"), "is the input"),
        (("ab", "{target}", "--json", "{folder}"), "no regular file"),
        (("convert-draft", "{folder}", "out.gguf", "--target", "{target}"), "config.json"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    run,  # type: ignore[no-untyped-def]
    target_path: Path,
    draft_path: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    named: str,
) -> None:
    paths = {"{target}": str(target_path), "{draft}": str(draft_path), "{folder}": str(tmp_path)}
    ran = run(*(paths.get(argument, argument) for argument in arguments))
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert named in ran.err
    assert ran.out == ""


def test_an_unknown_option_is_refused_by_name(run, target_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("generate", target_path, "--cache-q", "q4_0")
    assert ran.code == 2
    assert "--cache-q" in ran.err


def test_the_installed_command_runs() -> None:
    program = "from pydflash.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "explain"], capture_output=True, text=True, check=True)
    assert "max_context" in done.stdout
