"""Run many trials and print a table of what became of them.

    python -m tests.fuzz --trials gguf=50000 snapshots=15000 drafts=10000
    python -m tests.fuzz --seconds 600 --keep

Exits with 1 when there was a fault. ``--keep`` writes the recipe of the first trial of each place to tests/fuzz/seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.bases import write_bases
from tests.fuzz.drivers import KINDS as DRIVERS
from tests.fuzz.outcomes import FAULTS, KINDS
from tests.fuzz.processes import MEMORY, SECONDS, Worker

SEEDS = Path(__file__).parent / "seeds"


def main() -> int:
    args = _arguments()
    wanted = {name: int(count) for name, _, count in (text.partition("=") for text in args.trials)} or dict.fromkeys(
        DRIVERS, sys.maxsize
    )
    faults: list[tuple[str, int, str, str]] = []
    print(f"{'driver':<10}{'trials':>8}{'seconds':>9}" + "".join(f"{kind:>9}" for kind in KINDS), flush=True)
    with tempfile.TemporaryDirectory() as folder, Worker(write_bases(Path(folder)), args.limit, args.memory) as worker:
        for name, count in wanted.items():
            found: Counter[str] = Counter()
            begin = time.monotonic()
            for seed, outcome in worker.run(name, args.first, min(count, sys.maxsize)):
                found[outcome.kind] += 1
                if outcome.kind in FAULTS:
                    faults.append((name, seed, outcome.kind, outcome.place))
                    if args.verbose:
                        print(name, seed, outcome.kind, outcome.place, flush=True)
                if args.seconds and time.monotonic() - begin > args.seconds / len(wanted):
                    break
            worker.close()
            row = f"{name:<10}{found.total():>8}{time.monotonic() - begin:>9.0f}"
            print(row + "".join(f"{found[kind]:>9}" for kind in KINDS), flush=True)
        _report(faults, worker if args.keep else None)
    return 1 if faults else 0


def _report(faults: list[tuple[str, int, str, str]], worker: Worker | None) -> None:
    """Each place once, with its first seed; with a ``worker``, the recipe of that is kept."""
    places: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for name, seed, kind, place in faults:
        places.setdefault((name, kind, place.partition(": ")[0]), []).append((seed, place))
    for (name, kind, _), found in places.items():
        seed, place = found[0]
        print(f"\n{kind}, {len(found)} times, first with {name} {seed}: {place}")
        if worker is not None:
            recipe = json.dumps(worker.recipe(name, seed))
            digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
            (SEEDS / f"{name}-{digest}.json").write_text(recipe + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", nargs="*", default=[], metavar="DRIVER=COUNT", help=f"drivers: {', '.join(DRIVERS)}"
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="seconds in all, shared by the drivers [no limit]")
    parser.add_argument("--first", type=int, default=0, help="first seed [0]")
    parser.add_argument("--limit", type=float, default=SECONDS, help=f"seconds of a trial [{SECONDS:g}]")
    parser.add_argument("--memory", type=int, default=MEMORY, help=f"bytes of address space, 0 for no limit [{MEMORY}]")
    parser.add_argument("--keep", action="store_true", help="keep the recipes of faults in tests/fuzz/seeds")
    parser.add_argument("--verbose", action="store_true", help="print each fault at once")
    args = parser.parse_args()
    if not args.trials and not args.seconds:
        parser.error("say how much: --trials or --seconds")
    return args


if __name__ == "__main__":
    sys.exit(main())
