"""``pydflash demo``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pydflash
from pydflash.cli.engine import open_engine
from pydflash.cli.options import SamplingChoice, ShowStats, engine_options, sampling_options
from pydflash.cli.show import columns, fail, note, print_stats, print_stream
from pydflash.config import Settings

if TYPE_CHECKING:
    from pydflash.engine import Completion

__all__ = ["demo"]

PROMPT = '''class SilverRiver:
    """A silver river with level, width, limit and owner."""

    def __init__(self, level: float, width: int, limit: float, owner: str) -> None:
'''
DATA = Path(pydflash.__file__).with_name("data")


@sampling_options("max_tokens")
@engine_options("device", "threads")
def demo(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    *,
    sampling: SamplingChoice,
    settings: Settings,
    stats: ShowStats = False,
    model: Annotated[Path, typer.Option(hidden=True, help="GGUF file of the model.")] = DATA / "tiny-target.gguf",
    draft: Annotated[Path, typer.Option(hidden=True, help="GGUF file of the DFlash draft.")] = DATA / "tiny-draft.gguf",
) -> None:
    """Continue a prompt with the shipped tiny model, with its draft and without, and compare the two."""
    params = sampling.params()
    with open_engine(model, draft if draft.exists() else None, settings) as engine:
        if engine.draft is None:
            print(prompt, end="")
            done = print_stream(engine, prompt, params)
            note(f"{done.stats.tokens_per_second:.0f} tokens/s; there is no draft at {draft}, so nothing to compare")
            return
        warm = replace(params, max_tokens=min(params.max_tokens, 40))  # builds every graph, so that no run pays for it
        for speculate in (True, False):
            engine.generate(prompt, warm, speculate=speculate)
        print(prompt, end="")
        with_draft = print_stream(engine, prompt, params)
        without = engine.generate(prompt, params, speculate=False)
        _compare(with_draft, without)
        if stats:
            print_stats(with_draft.stats)
    if with_draft.text != without.text:
        fail("the two texts differ, which must never happen with greedy decoding; please report it")


def _compare(with_draft: Completion, without: Completion) -> None:
    fast, slow = with_draft.stats.tokens_per_second, without.stats.tokens_per_second
    runs = (("with the draft", with_draft.stats), ("without", without.stats))
    rows = [(name, f"{s.tokens_per_second:.0f}", str(s.tokens), str(s.steps)) for name, s in runs]
    columns([("", "tokens/s", "tokens", "steps"), *rows], sys.stderr)
    speed_up = f"{fast / slow:.2f} times as fast" if slow else "too short to compare"
    same = "the texts are equal" if with_draft.text == without.text else "the texts differ"
    note(f"{speed_up}, acceptance length {with_draft.stats.acceptance_length:.2f}, {same}")
