"""Options: one place, validated, and each value tells where it came from."""

from __future__ import annotations

import dataclasses

import pytest

from pydflash.config import EngineConfig, table
from pydflash.errors import ConfigError


def source(config: EngineConfig, name: str) -> tuple[object, str]:
    return next((s.value, s.source) for s in config.settings() if s.name == name)


def test_argument_wins_over_environment_wins_over_default() -> None:
    environment = {"PYDFLASH_MAX_CONTEXT": "123", "PYDFLASH_CACHE_K": "q8_0", "HOME": "/"}
    config = EngineConfig.resolve(environment, cache_k="q4_0", cache_v=None)
    assert source(config, "max_context") == (123, "environment (PYDFLASH_MAX_CONTEXT)")
    assert source(config, "cache_k") == ("q4_0", "argument")
    assert source(config, "cache_v") == ("f16", "default")


def test_every_field_has_a_variable_of_its_type() -> None:
    values = {
        "max_context": 7, "cache_k": "q4_0", "cache_v": "q8_0", "k_rotation": "signed-128",
        "v_rotation": "hadamard-64", "fused": False, "device": "cpu",
        "threads": 2, "chunk": 64, "draft_max": 3, "adaptive": True, "draft_causal": False,
    }  # fmt: skip
    assert set(values) == {field.name for field in dataclasses.fields(EngineConfig)} - {"sources"}
    environment = {f"PYDFLASH_{name.upper()}": str(value) for name, value in values.items()}
    assert EngineConfig.resolve(environment) == EngineConfig(**values)  # type: ignore[arg-type]


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
        ("cache_k", "q4_1", "q4_0"),
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
    ("variable", "text"),
    [
        ("PYDFLASH_MAX_CONTEXT", "4k"),
        ("PYDFLASH_ADAPTIVE", "2"),
        ("PYDFLASH_CACHE_K", "q3"),
        ("DFLASH_SKIP_WHT", "yes"),
    ],
)
def test_a_wrong_variable_is_an_error(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EngineConfig.resolve({variable: text})


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
    assert len(lines) == len(dataclasses.fields(EngineConfig)) - 1
    assert lines[0].split() == ["max_context", "99", "argument"]
