"""``pydflash chat``."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pydflash.cli.engine import open_engine
from pydflash.cli.options import Draft, Model, SamplingChoice, ShowStats, engine_options, sampling_options
from pydflash.cli.show import note, note_sampling, print_stats, print_stream
from pydflash.config import Settings
from pydflash.errors import ContextFull, NativeError, PydflashError, SessionClosed
from pydflash.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pydflash.engine import Engine

__all__ = ["Talk", "chat"]

COMMAND = re.compile(r"/([A-Za-z]+)(\s|$)")
HELP = """\
/clear   forget the talk, but for the system message
/drop    forget the oldest turns, as many as the last question needs, and ask it again
/help    this list
/quit    end the talk; so does Ctrl-D. Ctrl-C ends an answer
A message that starts with a slash and a word needs a space before it."""

Message = dict[str, Any]


@engine_options()
@sampling_options(temperature=0.7, top_k=20, top_p=0.8, max_tokens=1024)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    think: Annotated[
        bool | None,
        typer.Option(help="Let the model reason before it answers, or not.  [default: as its chat template decides]"),
    ] = None,
    draft: Draft = None,
    *,
    settings: Settings,
    sampling: SamplingChoice,
    stats: ShowStats = False,
) -> None:
    """Talk with a model. Ctrl-D or /quit ends the talk, Ctrl-C an answer, /help lists more. A pasted text is one
    message. Sampling options that are not given follow the model file where it recommends values."""
    from pydflash.cli.chat_input import chat_input

    with chat_input() as ask, open_engine(model, draft, settings) as engine:  # what is typed during loading waits too
        note_sampling(engine, sampling.given)
        talk = Talk(engine, sampling.params(engine.recommended), system, think, stats)
        while (message := ask()) is not None:
            talk.respond(message)


class Talk:
    """A conversation in the terminal: what was said so far, and the question that found no room."""

    def __init__(
        self, engine: Engine, params: SamplingParams, system: str | None, think: bool | None, stats: bool
    ) -> None:
        """Raises TemplateError where the model file has no usable template: no question would get an answer."""
        self._engine, self._params, self._stats = engine, params, stats
        self._variables = None if think is None else {"enable_thinking": think}
        template = engine.chat_template.source
        if think is not None and "enable_thinking" not in template:
            note("the chat template does not know enable_thinking, so --think and --no-think change nothing")
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[list[Message]] = []  # a question and what followed it
        self._refused: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation as the template gets it."""
        return [*self._system, *(message for turn in self._turns for message in turn)]

    def respond(self, message: str) -> None:
        """Run a command, or print the answer to a question. Where there is none, a line says why, and the question is
        forgotten; NativeError and SessionClosed are raised, since no other question would fare better."""
        command = COMMAND.match(message)
        try:
            if command:
                self._obey(command[1])
            else:
                self._ask(message)
        except KeyboardInterrupt:
            note("stopped before the answer; the question is forgotten")
        except (NativeError, SessionClosed):
            raise
        except PydflashError as error:
            note(f"error: {error}")

    def _obey(self, command: str) -> None:
        match command:
            case "clear":
                self._turns.clear()
                self._refused = None
            case "drop":
                self._drop_for_refused()
            case "help":
                for line in HELP.splitlines():
                    note(line)
            case _:
                note(f"there is no command /{command}; /help lists those there are")

    def _ask(self, question: str) -> None:
        self._refused = None
        asked = {"role": "user", "content": question}
        try:
            done = print_stream(self._engine, [*self.messages, asked], self._params, self._variables)
        except ContextFull:
            self._make_room(question)
            return
        answer = {"role": "assistant", "content": done.text}
        self._turns.append([asked, {**answer, "reasoning_content": done.reasoning} if done.reasoning else answer])
        if self._stats:
            print_stats(done.stats)
        if done.finish_reason == "context":
            note(f"the context of {self._context:,} tokens (--max-context) is full, so the answer ends here")
        elif done.finish_reason == "length" and done.reasoning and not done.text:
            note(f"the reasoning took all {self._params.max_tokens:,} tokens (--max-tokens), so there is no answer")

    # --- room in the context ------------------------------------------------------------------------------------------

    @property
    def _context(self) -> int:
        return self._engine.config.max_context

    @property
    def _too_many(self) -> str:
        return f"more than the context of {self._context:,} (--max-context)"

    def _make_room(self, question: str) -> None:
        """Drop the oldest turns, or offer that where someone is there to decide."""
        alone = self._tokens(len(self._turns), question)
        if alone > self._context:
            note(f"the question is not asked: it has {alone:,} tokens, {self._too_many}")
            return
        self._refused = question
        if sys.stdin.isatty():
            full = f"with this question the talk has {self._tokens(0, question):,} tokens, {self._too_many}"
            note(f"{full}; /drop forgets the oldest turns and asks again, /clear forgets them all")
        else:
            self._drop_for_refused()

    def _drop_for_refused(self) -> None:
        question = self._refused
        if question is None:
            note("no question waits for room in the context")
            return
        count, size = self._turns_to_drop(question), self._tokens(0, question)
        del self._turns[:count]
        forgotten = f"the oldest {count} turns are" if count > 1 else "the oldest turn is"
        note(f"{forgotten} forgotten: with this question the talk had {size:,} tokens, {self._too_many}")
        self._ask(question)

    def _turns_to_drop(self, question: str) -> int:
        """The fewest turns whose loss leaves room for the question and an answer, or for the question at least."""
        room = self._context - min(self._params.max_tokens, self._context // 4)
        few, many = 0, len(self._turns)
        while few < many:
            middle = (few + many) // 2
            few, many = (few, middle) if self._tokens(middle, question) <= room else (middle + 1, many)
        return few

    def _tokens(self, dropped: int, question: str) -> int:
        """Tokens of a prompt with ``question`` and without the first ``dropped`` turns."""
        kept = [message for turn in self._turns[dropped:] for message in turn]
        asked = {"role": "user", "content": question}
        return len(self._engine.encode([*self._system, *kept, asked], variables=self._variables))
