"""Settings: one declaration each, the same checks everywhere, and each value tells where it came from."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_type_hints

import numpy as np
import pytest
import typer

from pydflash import cli
from pydflash.config import EngineConfig, SessionConfig, Setting, Settings, table
from pydflash.decode import SamplingParams
from pydflash.engine import Engine
from pydflash.errors import ConfigError, LoadError
from pydflash.runtime import Session
from pydflash.sampling_params import recommendations
from pydflash.settings import Choice, Declaration, Flag, Integers, Pattern, Range, Texts, declarations

ENGINE, SAMPLING = declarations(EngineConfig), declarations(SamplingParams)


def valid_texts(declaration: Declaration) -> dict[str, Any]:
    """Texts that a setting accepts, and the value that each of them spells."""
    match declaration.rule:
        case Choice(values):
            return {str(value): value for value in values}
        case Flag():
            return {"true": True, "YES": True, "1": True, "off": False, "False": False, "0": False}
        case Range(low, high, above):
            least = low + 0.5 if above else low
            return {str(value): value for value in (least, low + 1 if high is None else high)}
        case Pattern(_, listed):
            forms = listed.replace(" or ", ", ").replace("N", "3").split(", ")
            return dict(zip(forms, forms))
        case Texts():
            return {"end": ("end",)}
        case Integers():
            return {"7": (7,), "0": (0,)}
    raise AssertionError(f"no samples of {declaration.rule}")


def invalid_texts(declaration: Declaration) -> list[str]:
    match declaration.rule:
        case Flag():
            return ["2", "maybe", "None"]
        case Range(low, high, above):
            beyond = [] if high is None else [str(high + 1)]
            return ["", "many", "nan", "1e999", "None", str(low if above else low - 1), *beyond]
        case Texts():
            return [""]
        case Integers():
            return ["", "many", "None", "-1", "1.5", "nan"]
        case Choice(values):
            return ["", "None", "17", values[0].upper() if isinstance(values[0], str) else f"{values[0]}.0"]
    return ["", "None", "cuda:", "cuda:x", "Cpu", "cpu\n"]


def plain(text: str) -> Any:
    """The number that a text spells, as a program would give it, or the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def option(name: str, text: str) -> str:
    return f"--{name.replace('_', '-')}={text}"


def samples(known: dict[str, Declaration], texts: Callable[[Declaration], Any]) -> list[tuple[str, str]]:
    return [(name, text) for name, declaration in known.items() for text in texts(declaration)]


@pytest.fixture
def explained(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, list[str]]]:
    def explain(*options: str) -> dict[str, list[str]]:
        """Value and source of every setting, by the command line."""
        with pytest.raises(SystemExit) as exit_:
            cli.main(["explain", *options])
        printed = capsys.readouterr()
        if exit_.value.code:
            raise ConfigError(printed.err)
        return {line.split()[0]: line.split(maxsplit=2)[1:] for line in printed.out.splitlines()}

    return explain


def source(config: EngineConfig, name: str) -> tuple[object, str]:
    return next((s.value, s.source) for s in config.settings() if s.name == name)


def test_argument_wins_over_environment_wins_over_default() -> None:
    environment = {"PYDFLASH_MAX_CONTEXT": "123", "PYDFLASH_CACHE_K": "q8_0", "HOME": "/"}
    config = EngineConfig.resolve(environment, cache_k="q4_0", cache_v=None)
    assert source(config, "max_context") == (123, "environment (PYDFLASH_MAX_CONTEXT)")
    assert source(config, "cache_k") == ("q4_0", "argument")
    assert source(config, "cache_v") == ("f16", "default")


def test_an_empty_variable_counts_as_unset_and_build_variables_are_left_alone() -> None:
    environment = {"PYDFLASH_CUDA": "ON", "PYDFLASH_GGML_SOURCE": "x", "PYDFLASH_DEVICE": ""}
    assert EngineConfig.resolve(environment) == EngineConfig()


def test_a_misspelt_variable_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"PYDFLASH_K_ROTAION.*PYDFLASH_K_ROTATION.*DFLASH_SKIP_WHT"):
        EngineConfig.resolve({"PYDFLASH_K_ROTAION": "none"})


def test_an_unknown_argument_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"cache_q.*cache_k"):
        EngineConfig.resolve({}, cache_q="q4_0")


@pytest.mark.parametrize(
    ("name", "value", "listed"),
    [
        ("max_context", 0, "1 to"),
        ("max_context", True, "integer"),
        ("max_context", 4096.0, "integer"),
        ("cache_k", "q4_k", "q4_0"),
        ("cache_v", "F16", "f16"),
        ("k_rotation", "hadamard", "hadamard-256"),
        ("v_rotation", "auto", "none, hadamard-256, hadamard-128, hadamard-64"),
        ("v_rotation", "signed-128", "hadamard-64"),
        ("fused", 1, "True"),
        ("device", 1, "cuda"),
        ("threads", 0, "1 to 512"),
        ("chunk", 100, "128"),
        ("chunk", 16, "32"),
        ("draft_max", 16, "1 to 15"),
        ("adaptive", 1, "True"),
        ("draft_causal", "no", "None"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_is_allowed(name: str, value: object, listed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*{listed}"):
        EngineConfig.resolve({}, **{name: value})


@pytest.mark.parametrize(
    ("environment", "arguments", "rotation", "why"),
    [
        ({}, {"cache_k": "q4_0"}, "auto", "default"),
        ({"DFLASH_SKIP_WHT": "1"}, {"cache_k": "q4_0"}, "none", "environment (DFLASH_SKIP_WHT)"),
        ({"DFLASH_SKIP_WHT": "1", "PYDFLASH_CACHE_K": "q4_0"}, {}, "none", "environment (DFLASH_SKIP_WHT)"),
        ({"DFLASH_SKIP_WHT": "0"}, {"cache_k": "q4_0"}, "auto", "default"),
        ({"DFLASH_SKIP_WHT": "1"}, {"cache_k": "q8_0"}, "auto", "default"),
        ({"DFLASH_SKIP_WHT": "1"}, {}, "auto", "default"),
        ({"DFLASH_SKIP_WHT": "1"}, {"cache_k": "q4_0", "k_rotation": "signed-128"}, "signed-128", "argument"),
        (
            {"DFLASH_SKIP_WHT": "1", "PYDFLASH_K_ROTATION": "hadamard-128"},
            {"cache_k": "q4_0"},
            "hadamard-128",
            "environment (PYDFLASH_K_ROTATION)",
        ),
    ],
)
def test_the_alias_for_an_unrotated_q4_0_cache(
    environment: dict[str, str], arguments: dict[str, str], rotation: str, why: str
) -> None:
    config = EngineConfig.resolve(environment, **arguments)
    assert source(config, "k_rotation") == (rotation, why)


def test_the_table_names_value_and_source_of_every_field() -> None:
    lines = table(EngineConfig.resolve({}, max_context=99).settings()).splitlines()
    assert len(lines) == len(declarations(EngineConfig))
    assert lines[0].split() == ["max_context", "99", "argument"]


def test_the_table_shows_lists_and_what_is_not_set_as_a_person_writes_them() -> None:
    shown = [Setting("a", None, "x"), Setting("b", (), "x"), Setting("c", ("d.*", "e"), "x"), Setting("f", False, "x")]
    assert [line.split()[1:-1] for line in table(shown).splitlines()] == [["none"], ["none"], ["d.*,", "e"], ["False"]]


# --- the environment, the library and the command line agree ----------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), samples(ENGINE, valid_texts))
def test_a_valid_value_is_the_same_wherever_it_is_given(
    name: str, text: str, explained: Callable[..., dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    value, variable = valid_texts(ENGINE[name])[text], f"PYDFLASH_{name.upper()}"
    assert source(EngineConfig.resolve({}, **{name: value}), name) == (value, "argument")
    assert source(EngineConfig.resolve({variable: text}), name) == (value, f"environment ({variable})")
    flag = f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    given = flag if isinstance(ENGINE[name].rule, Flag) else option(name, text)
    shown = table([Setting(name, value, "")]).split()[1]
    assert explained(given)[name] == [shown, "argument"]
    monkeypatch.setenv(variable, text)
    assert explained()[name] == [shown, f"environment ({variable})"]


@pytest.mark.parametrize(("name", "text"), samples(ENGINE, invalid_texts))
def test_an_invalid_value_is_an_error_wherever_it_is_given(
    name: str, text: str, explained: Callable[..., dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        Engine.load("none.gguf", environment={}, **{name: plain(text)})  # type: ignore[arg-type]
    if not isinstance(ENGINE[name].rule, Flag):
        with pytest.raises(ConfigError, match=f"error: --{name.replace('_', '-')} is "):
            explained(option(name, text))
    if text:  # an empty variable counts as unset
        monkeypatch.setenv(f"PYDFLASH_{name.upper()}", text)
        for run in (lambda: Engine.load("none.gguf"), explained):
            with pytest.raises(ConfigError, match=f"PYDFLASH_{name.upper()} is "):
                run()


@pytest.mark.parametrize(
    ("variable", "text"), [("DFLASH_SKIP_WHT", "yes"), ("DFLASH_SKIP_WHT", "2"), ("PYDFLASH_NOPE", "1")]
)
def test_a_wrong_variable_is_an_error_in_library_and_command_line(
    variable: str, text: str, explained: Callable[..., dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    for run in (lambda: Engine.load("none.gguf"), explained):
        with pytest.raises(ConfigError, match=variable):
            run()


@pytest.mark.parametrize(("name", "text"), samples(SAMPLING, valid_texts))
def test_a_valid_sampling_parameter_is_an_option(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = valid_texts(SAMPLING[name])[text]
    assert getattr(SamplingParams(**{name: value}), name) == value
    if not isinstance(SAMPLING[name].rule, Flag):
        with pytest.raises(SystemExit):
            cli.main(["generate", "none.gguf", "x", option(name, text)])
        assert "none.gguf" in capsys.readouterr().err  # the file is what is wrong


@pytest.mark.parametrize(("name", "text"), samples(SAMPLING, invalid_texts))
def test_an_invalid_sampling_parameter_is_an_error(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        SamplingParams(**{name: plain(text)})  # type: ignore[arg-type]
    if not isinstance(SAMPLING[name].rule, Flag):
        with pytest.raises(SystemExit):
            cli.main(["generate", "none.gguf", "x", option(name, text)])
        assert capsys.readouterr().err.startswith(f"error: --{name.replace('_', '-')} is ")


def test_a_valid_load_gets_as_far_as_the_file() -> None:
    with pytest.raises(LoadError, match="does not exist"):
        Engine.load("none.gguf", environment={}, **{name: d.default for name, d in ENGINE.items()})


# --- what a model file recommends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"temp": 0.6000000238418579, "top_p": 0.949999988079071}, {"temperature": 0.6, "top_p": 0.95}),
        ({"top_k": 20, "min_p": 0.0, "penalty_repeat": 1, "penalty_last_n": -1},
         {"top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0, "penalty_window": -1}),
        ({"top_k": 40.0, "temp": "0.7"}, {"top_k": 40, "temperature": 0.7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"mirostat": 0, "mirostat_tau": 5.0, "xtc_probability": 0.0, "xtc_threshold": 0.1, "sequence": ""}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_sampling_keys_of_a_file_become_parameters(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    found = list(recommendations({f"general.sampling.{key}": value for key, value in keys.items()}))
    assert {r.name: r.value for r in found} == expected
    assert [r.problem for r in found] == [""] * len(expected)
    SamplingParams(**expected)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("temp", -1.0, "temperature is -1.0; allowed"),
        ("temp", float("nan"), "temperature is nan"),
        ("temp", float("inf"), "temperature is inf"),
        ("temp", True, "temperature is True"),
        ("temp", "warm", "temperature is 'warm'"),
        ("temp", "x" * 10_000, "allowed: a finite number"),
        ("temp", [1.0], r"temperature is '\(list\)'"),
        ("temp", np.ones(3), r"temperature is '\(ndarray\)'"),
        ("top_k", 2.5, "top_k is 2.5"),
        ("top_p", 0.0, "top_p is 0.0"),
        ("penalty_repeat", 0.0, "repetition_penalty is 0.0"),
        ("mirostat", 2, "no such sampler"),
        ("xtc_probability", 0.5, "no such sampler"),
        ("sequence", "top_k;temperature", "no such sampler"),
    ],
)
def test_a_sampling_key_that_is_of_no_use_is_told(key: str, value: object, problem: str) -> None:
    (found,) = recommendations({f"general.sampling.{key}": value})
    assert found.name == ""
    assert re.search(problem, found.problem)
    assert len(found.shown) < 300


# --- one declaration each ---------------------------------------------------------------------------------------------


def test_the_keywords_of_load_are_the_fields_of_the_configuration() -> None:
    fields = get_type_hints(EngineConfig)
    assert get_type_hints(Settings) == {name: fields[name] | None for name in ENGINE}


def test_a_session_takes_the_fields_of_its_configuration_with_their_defaults() -> None:
    parameters = inspect.signature(Session).parameters
    known = declarations(SessionConfig)
    assert set(parameters) == {"model", "capture", *known}
    assert {name: parameters[name].default for name in known} == {name: d.default for name, d in known.items()}


def help_texts() -> dict[str, str]:
    """Of every setting and every option of every command."""
    texts = {name: declaration.help for name, declaration in (ENGINE | SAMPLING).items()}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            texts[f"{name} {parameter.name}"] = parameter.help.split("  [default: ")[0]
    return texts


@pytest.mark.parametrize(("name", "text"), help_texts().items(), ids=lambda value: value.split(".")[0])
def test_a_help_text_is_a_sentence_that_stands_alone(name: str, text: str) -> None:
    assert text.endswith(".")
    assert text[0].isupper()
    assert not text.startswith("Of ")


def test_help_and_explain_need_neither_numpy_nor_native_code() -> None:
    program = (
        "import sys; from pydflash import cli\ntry: cli.main(['explain'])\nexcept SystemExit: pass\n"
        "print('numpy' in sys.modules, 'pydflash._ffi' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


WRONG = {"texts": np.array(["q4_0", "q8_0"]), "zeros": np.zeros(2), "huge": 10**5000, "bytes": b"cpu", "dict": {}}


@pytest.mark.parametrize("name", declarations(EngineConfig))
@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_a_value_of_another_kind_is_refused_whatever_the_environment_says(name: str, value: Any) -> None:
    for environment in ({}, {"DFLASH_SKIP_WHT": "1"}):
        with pytest.raises(ConfigError, match=name):
            EngineConfig.resolve(environment, **{name: value})


@pytest.mark.parametrize("environment", [5, ["PYDFLASH_CHUNK"], {1: "a"}, {"PYDFLASH_CHUNK": 512}], ids=str)
def test_an_environment_that_is_none_is_refused(environment: Any) -> None:
    with pytest.raises(ConfigError, match="environment"):
        EngineConfig.resolve(environment)
