"""``pydflash chat``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pydflash.cli.engine import open_engine
from pydflash.cli.options import Draft, Model, ShowStats, engine_options, sampling_options
from pydflash.cli.show import print_stats, print_stream
from pydflash.config import Settings
from pydflash.sampling_params import SamplingParams

__all__ = ["chat"]


@engine_options()
@sampling_options(temperature=0.7, top_k=20, top_p=0.8, max_tokens=1024)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    draft: Draft = None,
    *,
    settings: Settings,
    params: SamplingParams,
    stats: ShowStats = False,
) -> None:
    """Talk with a model. Ctrl-D or /quit ends the talk, Ctrl-C an answer. A pasted text is one message."""
    from pydflash.cli.chat_input import chat_input

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    with chat_input() as ask, open_engine(model, draft, settings) as engine:  # what is typed during loading waits too
        while (message := ask()) is not None:
            messages.append({"role": "user", "content": message})
            done = print_stream(engine, messages, params)
            messages.append({"role": "assistant", "content": done.text})
            if stats:
                print_stats(done.stats)
