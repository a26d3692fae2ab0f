"""Command-line options that follow from the settings: spelled like the parameters, with the same checks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pydflash.config import EngineConfig, Settings
from pydflash.sampling_params import SamplingParams
from pydflash.settings import Declaration, Flag, Integers, Texts, declarations

__all__ = ["Draft", "Model", "SamplingChoice", "ShowStats", "engine_options", "sampling_options"]

SEVERAL = (Integers, Texts)  # rules of options that may be given several times

Command = Callable[..., None]
Decorator = Callable[[Command], Command]

Model = Annotated[
    Path, typer.Argument(help="GGUF file of the model; the first part of a split one.", show_default=False)
]
Draft = Annotated[Path | None, typer.Option(help="GGUF file of the draft, or a name: ngram needs no file.")]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print what the generation cost.")]


def engine_options(*only: str, without: Collection[str] = ()) -> Decorator:
    """Give a command an option for every setting of an engine, or for ``only`` some, or for all ``without`` some.

    The command gets the values that were given as its keyword argument ``settings``.
    """
    return _options("settings", _chosen(EngineConfig, only, without), lambda given: cast("Settings", given))


def sampling_options(*only: str, **defaults: Any) -> Decorator:
    """Give a command an option for every sampling parameter, or for ``only`` some. ``defaults`` replace those of
    SamplingParams.

    The command gets a SamplingChoice as its keyword argument ``sampling``.
    """
    known = _chosen(SamplingParams, only, ())
    chosen = {name: replace(known[name], default=defaults.get(name, known[name].default)) for name in known}
    return _options("sampling", chosen, lambda given: SamplingChoice(given, defaults))


@dataclass(frozen=True)
class SamplingChoice:
    """The sampling parameters given as options, and a command's own defaults."""

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def params(self, recommended: Mapping[str, Any] | None = None) -> SamplingParams:
        """Options over what the model file recommends over the command's defaults."""
        return SamplingParams(**{**self.defaults, **(recommended or {}), **self.given})


def _chosen(config: type, only: Collection[str], without: Collection[str]) -> dict[str, Declaration]:
    known = declarations(config)
    return {name: known[name] for name in (only or known) if name not in without}


def _options(parameter: str, declared: Mapping[str, Declaration], build: Callable[[dict[str, Any]], Any]) -> Decorator:
    """A decorator that puts options in the place of ``parameter``, which gets what ``build`` makes of their values."""
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(declaration))
        for name, declaration in declared.items()
    ]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = list(signature.parameters.values())
        at = list(signature.parameters).index(parameter)
        parameters[at : at + 1] = options

        @functools.wraps(command)
        def expanded(**given: Any) -> None:
            texts = {name: given.pop(name) for name in declared}
            values = {name: _value(name, declared[name], text) for name, text in texts.items() if text is not None}
            command(**given, **{parameter: build(values)})

        # The command line is made from these two.
        expanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {p.name: p.annotation for p in parameters}
        return expanded

    return decorate


def _annotation(declaration: Declaration) -> Any:
    option = typer.Option(help=_help(declaration))
    if isinstance(declaration.rule, Flag):
        return Annotated[bool | None, option]
    option.metavar = declaration.rule.metavar
    return Annotated[list[str] | None if isinstance(declaration.rule, SEVERAL) else str | None, option]


def _help(declaration: Declaration) -> str:
    """The help text, the values where they can be listed, and what holds when the option is not given."""
    text = declaration.help.removesuffix(".") + (f": {declaration.rule.listed}." if declaration.rule.listed else ".")
    if isinstance(declaration.rule, SEVERAL):
        text += " May be given several times."
    default = _shown(declaration)
    return f"{text}  [default: {default}]" if default else text


def _shown(declaration: Declaration) -> str:
    """The default as a person would write it; empty where there is nothing to say."""
    match declaration.default:
        case None:
            return declaration.unset
        case bool(flag):
            return "yes" if flag else "no"
        case float(number):
            return f"{number:g}"
        case ():
            return ""
        case other:
            return str(other)


def _value(name: str, declaration: Declaration, given: Any) -> Any:
    """What was given for an option, checked: a text, or what the command line has made a flag or a list already."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(given, list):
        return tuple(item for text in given for item in declaration.read(text, option))
    return declaration.read(given, option) if isinstance(given, str) else declaration.check(given, option)
