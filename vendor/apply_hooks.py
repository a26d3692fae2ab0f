"""Insert our hooks into one ggml source file and write the result elsewhere; ggml's own tree stays as it is.

``python apply_hooks.py SOURCE OUTPUT HOOK...``. A hook file has three sections, each started by a line ``[reason]``,
``[anchor]`` or ``[insert]``. The text of ``insert`` goes right after the anchor, which must occur exactly once.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def read_hook(path: Path) -> dict[str, str]:
    sections = re.split(r"^\[(reason|anchor|insert)\]\n", path.read_text(), flags=re.MULTILINE)[1:]
    hook = dict(zip(sections[::2], sections[1::2]))
    if set(hook) != {"reason", "anchor", "insert"}:
        sys.exit(f"{path}: expected the sections reason, anchor and insert, found {sorted(hook)}")
    return hook


def apply(source: str, path: Path) -> str:
    hook = read_hook(path)
    count = source.count(hook["anchor"])
    if count != 1:
        sys.exit(
            f"{path.name}: its anchor occurs {count} times in the pinned ggml instead of once.\n"
            f"ggml has changed there. Reason for the hook: {hook['reason'].strip()}\n"
            "Write the anchor anew against the new source (vendor/README.md, 'Moving the pin')."
        )
    return source.replace(hook["anchor"], hook["anchor"] + hook["insert"])


def main() -> None:
    source, output, hooks = Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]
    text = source.read_text()
    for hook in hooks:
        text = apply(text, hook)
    if not output.exists() or output.read_text() != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


if __name__ == "__main__":
    main()
