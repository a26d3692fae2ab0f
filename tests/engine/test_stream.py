"""A stream ends when its caller, any other thread or its engine ends it, and leaves the engine usable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pydflash.decode import SamplingParams
from pydflash.engine import Engine
from pydflash.errors import ConfigError, ContextFull, SessionClosed, ShapeError, StateError

PROMPT = "the cat sat on"
OPTIONS = {"device": "cpu", "threads": 1, "max_context": 256, "environment": {}}


def greedy(max_tokens: int = 48, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **options})  # type: ignore[arg-type]


def test_closing_a_stream_cancels_and_the_engine_is_usable_at_once(speculating: Engine) -> None:
    whole = speculating.generate(PROMPT, greedy())
    for steps in (0, 1, 3):
        stream = speculating.stream(PROMPT, greedy())
        for _ in range(steps):
            next(stream)
        stream.close()
        assert speculating.generate(PROMPT, greedy()).tokens == whole.tokens


def test_leaving_the_loop_cancels(engine: Engine) -> None:
    for _ in engine.stream(PROMPT, greedy()):
        break
    assert len(engine.generate(PROMPT, greedy(4)).tokens) == 4


def test_an_unfinished_stream_gives_way_to_the_next_call_of_its_thread_and_says_so(engine: Engine) -> None:
    wanted = engine.generate(PROMPT, greedy()).tokens
    first, second = engine.stream(PROMPT, greedy()), engine.stream(PROMPT, greedy())
    next(first)
    assert tuple(token for chunk in second for token in chunk.tokens) == wanted
    with pytest.raises(StateError, match="has generated something else since"):
        next(first)
    assert list(first) == []


def test_a_stream_that_a_traceback_holds_does_not_lock_the_engine(engine: Engine) -> None:
    wanted = engine.generate(PROMPT, greedy()).tokens

    def consume() -> None:
        stream = engine.stream(PROMPT, greedy())
        for _ in stream:
            raise KeyError("the consumer's own")

    held: list[BaseException] = []
    for caller in (lambda f: f(), lambda f: run_in_a_thread(f)):
        try:
            caller(consume)
        except KeyError as error:
            held.append(error)  # with its traceback, whose frame holds the stream
        assert engine.generate(PROMPT, greedy()).tokens == wanted
    assert len(held) == 2


def run_in_a_thread(function: Callable[[], object]) -> None:
    """Raises what ``function`` raised there, like a future."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_another_thread_is_refused_while_one_generates(engine: Engine) -> None:
    with engine.stream(PROMPT, greedy()) as stream:
        next(stream)
        with pytest.raises(StateError, match="generating already for another thread"):
            run_in_a_thread(lambda: engine.generate(PROMPT))
        assert sum(len(chunk.tokens) for chunk in stream) == 47


@pytest.mark.parametrize("how", ["stream.close", "engine.cancel", "engine.close"])
@pytest.mark.parametrize("where", ["in the prompt", "while decoding"])
def test_any_thread_can_end_a_generation(target_path: Path, draft_path: Path, how: str, where: str) -> None:
    prompt = [5] * (1500 if where == "in the prompt" else 20)
    with Engine.load(target_path, draft_path, chunk=32, **OPTIONS | {"max_context": 4096}) as engine:  # type: ignore[arg-type]
        stream, chunks, begun = engine.stream(prompt, greedy(2000)), [], threading.Event()

        def consume() -> None:
            begun.set()
            chunks.extend(stream)

        worker = threading.Thread(target=consume)
        worker.start()
        begun.wait()
        while where == "while decoding" and not chunks:
            time.sleep(0.001)
        {"stream.close": stream.close, "engine.cancel": engine.cancel, "engine.close": engine.close}[how]()
        worker.join(timeout=20)
        assert not worker.is_alive()
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert len(tokens) < 2000
        assert all(chunk.finish_reason in (None, "cancelled") for chunk in chunks)
        if how != "engine.close":
            assert len(engine.generate("again", greedy(5)).tokens) == 5


def test_a_cancelled_generate_returns_what_there_is(target_path: Path) -> None:
    with Engine.load(target_path, **OPTIONS | {"max_context": 4096}) as engine:  # type: ignore[arg-type]
        whole = engine.generate(PROMPT, greedy(3000))
        timer = threading.Timer(0.05, engine.cancel)
        timer.start()
        done = engine.generate(PROMPT, greedy(3000))
        timer.join()
        assert done.finish_reason == "cancelled"
        assert done.tokens == whole.tokens[: len(done.tokens)]
        assert done.stats.tokens == len(done.tokens) < 3000


def test_a_stream_asked_by_two_threads_at_once_refuses_one(engine: Engine) -> None:
    stream, errors, counts = engine.stream("x " * 200, greedy()), [], []

    def consume() -> None:
        try:
            counts.append(sum(len(chunk.tokens) for chunk in stream))
        except StateError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=consume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) <= 1
    assert all("another thread waits for this stream's next chunk" in error for error in errors)
    stream.close()


def test_a_closed_engine_says_so(target_path: Path, draft_path: Path) -> None:
    engine = Engine.load(target_path, draft_path, **OPTIONS)  # type: ignore[arg-type]
    stream, unstarted = engine.stream(PROMPT, greedy()), engine.stream(PROMPT, greedy())
    next(stream)
    engine.close()
    engine.close()
    assert list(stream) == list(unstarted) == []
    with pytest.raises(SessionClosed, match="closed"):
        engine.stream(PROMPT)


# --- what the call itself refuses -------------------------------------------------------------------------------------


def test_a_prompt_that_cannot_be_run_is_refused_by_the_call_and_ends_no_other_stream(engine: Engine) -> None:
    first = engine.stream(PROMPT, greedy())
    next(first)
    with pytest.raises(ContextFull, match="0 of 512 positions are used and 600 more"):
        engine.stream([1] * 600)
    with pytest.raises(ShapeError, match="token id 512 is outside"):
        engine.stream([1, 512])
    with pytest.raises(ConfigError, match="params is 5"):
        engine.stream(PROMPT, 5)  # type: ignore[arg-type]
    assert sum(len(chunk.tokens) for chunk in first) == 47


def test_another_thread_is_refused_by_the_call_and_not_by_the_first_chunk(engine: Engine) -> None:
    def ask() -> None:
        with pytest.raises(StateError, match="generating already for another thread"):
            engine.stream(PROMPT)

    with engine.stream(PROMPT, greedy()) as stream:
        next(stream)
        run_in_a_thread(ask)


@pytest.mark.parametrize("kept", [True, False])
def test_a_stream_that_nobody_reads_keeps_no_thread_from_the_engine(engine: Engine, kept: bool) -> None:
    held = [engine.stream(PROMPT, greedy()) for _ in range(3)]
    if not kept:
        held.clear()
    run_in_a_thread(lambda: engine.generate(PROMPT, greedy(4)))
    assert len(engine.generate(PROMPT, greedy(4)).tokens) == 4


def test_the_first_chunk_is_refused_where_another_thread_began_after_the_call(engine: Engine) -> None:
    early = engine.stream(PROMPT, greedy())
    begun, done = threading.Event(), threading.Event()

    def generate() -> None:
        with engine.stream(PROMPT, greedy()) as stream:
            next(stream)
            begun.set()
            done.wait(20)

    worker = threading.Thread(target=generate)
    worker.start()
    begun.wait(20)
    with pytest.raises(StateError, match="generating already for another thread"):
        next(early)
    done.set()
    worker.join()
