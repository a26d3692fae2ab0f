"""Check that left_out.cpp defines what the built files of ggml's CUDA back end name and lack, and nothing else.

``python check_left_out.py NM OBJECT...`` runs after libggml-cuda has been linked, which has shown that nothing is
missing (``-z defs``). It stops the build at a leftover: a body that another object defines as well, or that none names.
"""

from __future__ import annotations

import re
import subprocess
import sys

STUBS = "left_out.cpp"


def symbols(nm: str, objects: list[str], which: str) -> set[str]:
    """The external names that are defined (``--defined-only``) or open (``--undefined-only``) in ``objects``."""
    if not objects:
        return set()
    command = [nm, "--extern-only", "--format=posix", which, *objects]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in output.splitlines() if not line.endswith(":") and line.strip()}


def main() -> None:
    nm, *objects = sys.argv[1:]
    stubs = [path for path in objects if re.search(rf"/{re.escape(STUBS)}\.o(bj)?$", path)]
    others = [path for path in objects if path not in stubs]
    bodies = symbols(nm, stubs, "--defined-only")
    twice = bodies & symbols(nm, others, "--defined-only")
    unused = bodies - symbols(nm, others, "--undefined-only") - twice
    if not bodies or twice or unused:
        names = [f"  {name}: built as well" for name in twice] + [f"  {name}: nobody names it" for name in unused]
        sys.exit("\n".join([f"{STUBS} does not fit the files that are built ({len(bodies)} bodies):", *sorted(names)]))


if __name__ == "__main__":
    main()
