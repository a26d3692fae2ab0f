"""Do answers stay right, and does the process stay alive, whatever threads, forks and exits do?

    python -m benchmarks.robustness --device cpu
    python -m benchmarks.robustness --device cuda --only answers exits

Each check runs in processes of its own, so that a crash is a figure. Exits with 1 when a check found a fault. With the
shipped pair unless --target and --draft name another.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pydflash
from pydflash import Engine, Sampler, SamplingParams, Session, load_draft, load_model
from pydflash.config import EngineConfig
from pydflash.decode import autoregressive, collect
from pydflash.errors import PydflashError, SessionClosed

DATA = Path(pydflash.__file__).parent / "data"
WORDS = [
    "class A:",
    "def f(self):",
    "    return",
    "import os",
    "x = ",
    "for i in range(",
    "if x:",
    "self.",
    "\n",
    "# a",
]


def requests(count: int, seed: int = 0) -> list[tuple[str, SamplingParams]]:
    """Random prompts of 1 to 200 words, greedy, sampled and penalised."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        prompt = " ".join(rng.choice(WORDS) for _ in range(rng.choice((1, 5, 30, 200))))
        options = rng.choice(({}, {"temperature": 0.8, "seed": i}, {"repetition_penalty": 1.2}, {"top_p": 0.9}))
        made.append((prompt, SamplingParams(max_tokens=rng.choice((1, 8, 32)), ignore_eos=True, **options)))
    return made


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- checks: each returns what it found, and whether that is a fault --------------------------------------------------


def answers(args: argparse.Namespace) -> tuple[str, bool]:
    """Random generations of engines and sessions that share one model, eight threads at once, against serial ones."""
    asked, rng = requests(40), random.Random(1)
    with load_model(args.target, args.device, threads=args.threads) as model, load_draft(args.draft, model) as draft:
        config = EngineConfig(device=args.device, max_context=1024, chunk=128)
        with Engine.share(model, None, config) as alone:
            wanted = [alone.generate(prompt, params).tokens for prompt, params in asked]
        engines = [Engine.share(model, draft if i % 2 else None, config) for i in range(6)]
        sessions = [Session(model, 1024, chunk=128) for _ in range(2)]
        plan = [[rng.randrange(len(asked)) for _ in range(args.generations // 8)] for _ in range(8)]
        differing: list[int] = []

        def with_session(session: Session, prompt: str, params: SamplingParams) -> tuple[int, ...]:
            session.reset()
            sampler = Sampler(params, model.config.vocab)
            ids = engines[0].encode(prompt)
            return tuple(collect(autoregressive(session, ids, sampler, max_tokens=params.max_tokens))[0])

        def work(i: int) -> None:
            for request in plan[i]:
                prompt, params = asked[request]
                if i < len(engines):
                    found = engines[i].generate(prompt, params).tokens
                else:
                    found = with_session(sessions[i - len(engines)], prompt, params)
                if found != wanted[request]:
                    differing.append(request)

        begin = time.perf_counter()
        in_threads(8, work)
        seconds = time.perf_counter() - begin
        for opened in (*engines, *sessions):
            opened.close()
    done = sum(map(len, plan))
    return f"{done} generations in 8 threads, {len(differing)} differ from the serial ones, {seconds:.0f} s", bool(
        differing
    )


def exit_once(args: argparse.Namespace) -> None:
    """End the interpreter while daemon threads generate."""
    engine = Engine.load(args.target, args.draft, device=args.device, threads=args.threads, environment={})
    other = Engine.share(engine.model, None, engine.config)
    begun = [threading.Event() for _ in range(2)]

    def work(engine: Engine, begun: threading.Event) -> None:
        while True:
            for _ in engine.stream("def f(x):\n" * 40, SamplingParams(max_tokens=200, ignore_eos=True)):
                begun.set()

    for one, event in zip((engine, other), begun):
        threading.Thread(target=work, args=(one, event), daemon=True).start()
        event.wait()
    time.sleep(random.random() * 0.05)


def exits(args: argparse.Namespace) -> tuple[str, bool]:
    """Exit codes and stderr of interpreters that end beside running daemon threads."""
    failures: list[str] = []
    for _ in range(args.exits):
        ran = subprocess.run(child_command(args, "exit_once"), capture_output=True, text=True, timeout=120)
        if ran.returncode or ran.stderr:
            failures.append(f"exit code {ran.returncode}: {ran.stderr.strip()[-200:]}")
    return f"{args.exits - len(failures)} of {args.exits} exits beside daemon threads clean {failures[:1]}", bool(
        failures
    )


def forks(args: argparse.Namespace) -> tuple[str, bool]:
    """What a child of fork gets, while another thread generates or not; the parent's text before and after."""
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    outcomes: dict[str, int] = {}
    with Engine.load(args.target, args.draft, device=args.device, threads=args.threads, environment={}) as engine:
        wanted = engine.generate("class A:\n", params).tokens
        with Engine.share(engine.model, None, engine.config) as other:
            for i in range(args.forks):
                stop = threading.Event()

                def beside(stop: threading.Event = stop) -> None:
                    while not stop.is_set():
                        other.generate("x = ", params)

                thread = threading.Thread(target=beside)
                if i % 2:
                    thread.start()
                pid = os.fork()
                if pid == 0:
                    signal.alarm(30)  # a child that hangs is ended
                    try:
                        engine.generate("class A:\n", params)
                        os._exit(0)
                    except PydflashError as error:
                        os._exit(2 if "fork" in str(error) else 3)
                _, status = os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(status)
                outcome = {0: "generates", 2: "told to load after the fork"}.get(code, f"exit code {code}")
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                stop.set()
                if i % 2:
                    thread.join()
        same = engine.generate("class A:\n", params).tokens == wanted
    fault = not same or set(outcomes) - {"generates", "told to load after the fork"} != set()
    return f"{args.forks} forks: {outcomes}; parent {'goes on with the same text' if same else 'differs'}", fault


def closes(args: argparse.Namespace) -> tuple[str, bool]:
    """Sessions, engines and models closed while another thread generates: how that thread's generation ends."""
    outcomes: dict[str, int] = {}
    for i in range(args.closes):
        model = load_model(args.target, args.device, threads=args.threads)
        engine = Engine.share(model, None, EngineConfig(device=args.device))
        begun = threading.Event()

        def work(engine: Engine = engine, begun: threading.Event = begun) -> None:
            outcome = "an end without a reason"
            try:
                for chunk in engine.stream("x " * 300, SamplingParams(max_tokens=3000, ignore_eos=True)):
                    begun.set()
                    outcome = chunk.finish_reason or outcome
            except SessionClosed:
                outcome = "SessionClosed"
            except BaseException as error:
                outcome = repr(error)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        (engine.session, engine, model)[i % 3].close()
        thread.join(60)
        engine.close()
        model.close()
    ended = sum(outcomes.get(name, 0) for name in ("cancelled", "SessionClosed", "an end without a reason"))
    return f"{args.closes} closed beside a running generation: {outcomes}", ended != args.closes


def cancels(args: argparse.Namespace) -> tuple[str, bool]:
    """How long after Engine.cancel a generation of another thread ends, in its prompt, against a chunk's time."""
    latencies, chunk, ended = [], 64, 0
    with Engine.load(
        args.target, device=args.device, threads=args.threads, max_context=16_384, chunk=chunk, environment={}
    ) as engine:
        ids = [5] * 16_000
        begin = time.perf_counter()
        for _ in engine.session.prefill(ids[: 16 * chunk]):
            pass
        each = (time.perf_counter() - begin) / 16
        for _ in range(args.cancels):
            reasons: list[str | None] = []
            thread = threading.Thread(
                target=lambda reasons=reasons: reasons.append(engine.generate(ids).finish_reason)  # type: ignore[misc]
            )
            thread.start()
            time.sleep(0.1)
            begin = time.perf_counter()
            engine.cancel()
            thread.join()
            latencies.append(time.perf_counter() - begin)
            ended += reasons == ["cancelled"]
    text = (
        f"{ended} of {args.cancels} cancelled in the prompt, after {1e3 * statistics.median(latencies):.1f} ms in the "
    )
    text += f"median and {1e3 * max(latencies):.1f} at most; a chunk takes {1e3 * each:.1f} ms"
    return text, ended != args.cancels


CHECKS: dict[str, Callable[[argparse.Namespace], tuple[str, bool]]] = {
    "answers": answers, "exits": exits, "forks": forks, "closes": closes, "cancels": cancels,
}  # fmt: skip


# --- processes --------------------------------------------------------------------------------------------------------


def child_command(args: argparse.Namespace, check: str) -> list[str]:
    given = {name: value for name, value in vars(args).items() if value is not None and name not in ("only", "child")}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "benchmarks.robustness", "--child", check, *options]


def results(args: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    for check in args.only or CHECKS:
        ran = subprocess.run(child_command(args, check), capture_output=True, text=True)
        lines = ran.stdout.splitlines()
        if ran.returncode == 0 and lines:
            yield check, *json.loads(lines[-1])
        else:
            yield check, f"died with exit code {ran.returncode}: {ran.stderr.strip()[-300:]}", True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(DATA / "tiny-target.gguf"), help="GGUF file of the model")
    parser.add_argument("--draft", default=str(DATA / "tiny-draft.gguf"), help="GGUF file of its draft")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    parser.add_argument("--only", nargs="*", choices=tuple(CHECKS), help="checks to run [all]")
    for name, count in (("generations", 1000), ("exits", 100), ("forks", 20), ("closes", 60), ("cancels", 20)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"how many {name} to try [{count}]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "exit_once":
        exit_once(args)
        return 0
    if args.child:
        print(json.dumps(CHECKS[args.child](args)))
        return 0
    faults = 0
    for check, text, fault in results(args):
        faults += fault
        print(f"{'FAULT' if fault else 'ok':5}  {check:8}  {text}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
