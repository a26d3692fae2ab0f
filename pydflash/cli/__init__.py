"""The command line: ``pydflash COMMAND``, one module a command.

Generated text goes to stdout, everything else to stderr. The engine is imported when a command needs it, so that help
is fast.
"""

from __future__ import annotations

import warnings

import typer

from pydflash.cli import ab, bench, chat, convert, demo, doctor, explain, generate, info
from pydflash.cli.show import fail, note
from pydflash.errors import PydflashError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts hold brackets
    help="Run Qwen3.5/3.6-class GGUF models, with a DFlash draft or without.",
)
for command in (
    demo.demo,
    generate.generate,
    chat.chat,
    info.info,
    doctor.doctor,
    explain.explain,
    convert.convert_draft,
    bench.bench,
    ab.ab,
):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line. A PydflashError is one line on stderr and exit code 2, a warning one line."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(args=arguments, prog_name="pydflash")
        except PydflashError as error:
            fail(str(error))


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    note(f"warning: {message}")
