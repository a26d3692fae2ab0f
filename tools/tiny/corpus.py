"""The text that the tiny pair learns: Python's standard library, recall exercises and short chats.

A file belongs to the held-out set if its sha256 says so, so the split does not depend on order or on other files.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.tiny.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]

LARGEST_FILE = 300_000  # bytes; longer ones are generated tables
# Packages of other projects, character tables, and files whose text is not meant to be sensible Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "data", "cjkencodings", "__pycache__"}
SKIPPED_PREFIXES = ("bad", "_sysconfigdata", "test_unicode", "test_codec")
KEYS = [
    "amber",
    "basil",
    "cedar",
    "coral",
    "crane",
    "delta",
    "ebony",
    "ember",
    "fable",
    "fjord",
    "flint",
    "glade",
    "grove",
    "hazel",
    "heron",
    "indigo",
    "ivory",
    "jade",
    "juniper",
    "kestrel",
    "lagoon",
    "larch",
    "lilac",
    "lotus",
    "maple",
    "marble",
    "meadow",
    "nectar",
    "nutmeg",
    "ocean",
    "olive",
    "onyx",
    "opal",
    "orchid",
    "otter",
    "pearl",
    "pepper",
    "plum",
    "poppy",
    "quartz",
    "raven",
    "river",
    "saffron",
    "sage",
    "scarlet",
    "sierra",
    "slate",
    "sparrow",
    "spruce",
    "thistle",
    "tulip",
    "velvet",
    "violet",
    "walnut",
    "willow",
    "zephyr",
]


@dataclass(frozen=True)
class SourceFile:
    name: str  # path inside the library
    text: str
    held_out: bool


def read_library(root: Path | None = None) -> list[SourceFile]:
    """All suitable .py files below `root` (default: the running interpreter's standard library), sorted by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or name.name.startswith(SKIPPED_PREFIXES):
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if 200 < len(raw) < LARGEST_FILE:
            files.append(SourceFile(name.as_posix(), text, hashlib.sha256(raw).digest()[0] < 13))  # 5 %
    return files


def fingerprint(files: list[SourceFile]) -> str:
    """A digest of everything read, to tell whether two runs saw the same text."""
    return hashlib.sha256("".join(f.name + f.text for f in files).encode()).hexdigest()


def chats(files: list[SourceFile]) -> list[str]:
    """ChatML dialogues: the user names a documented function, the assistant answers with its source."""
    dialogues = []
    for file in files:
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            continue
        lines = file.text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (summary := ast.get_docstring(node)):
                continue
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
            if 80 < len(source) < 1500:
                question = f"Write the Python function `{node.name}`: {summary.splitlines()[0]}"
                dialogues.append(
                    f"<|im_start|>user\n{question}<|im_end|>\n"
                    f"<|im_start|>assistant\n```python\n{source}\n```<|im_end|>\n<|endoftext|>"
                )
    return dialogues


# -------------------------------------------------------------------------------------------------- recall text
def remember(key: str, code: int) -> str:
    return f"# remember: the code of {key} is {code}\n"


def recall(key: str, code: int | str) -> str:
    return f"# recall: the code of {key} is {code}\n"


def recall_exercise(rng: np.random.Generator, lines: list[str], characters: int) -> str:
    """Source text of about `characters` with 2 to 6 codes planted in it and asked for later, at random distances."""
    start = int(rng.integers(max(1, len(lines) - characters // 40)))  # about 40 characters a line
    body: list[str] = []
    size = 0
    while size < characters and start < len(lines):
        body.append(lines[start])
        size += len(lines[start])
        start += 1
    inserts: list[tuple[int, int, str]] = []  # (line, 0 to remember or 1 to recall, text)
    for key in rng.choice(KEYS, size=int(rng.integers(2, 7)), replace=False):
        code = int(rng.integers(1000, 10_000))
        first = int(rng.integers(len(body) + 1))
        inserts.append((first, 0, remember(key, code)))
        inserts += [(int(at), 1, recall(key, code)) for at in rng.integers(first, len(body) + 1, size=2)]
    for at, _, line in sorted(inserts, reverse=True):  # backwards, so that earlier places stay valid
        body.insert(at, line)
    return "".join(body)


# ------------------------------------------------------------------------------------------------------ batches
class Mixture:
    """Draws training windows: source text, `recall_share` recall exercises and `chat_share` dialogues."""

    def __init__(self, files: list[SourceFile], vocabulary: Vocabulary, recall_share: float, chat_share: float) -> None:
        self.vocabulary = vocabulary
        self.recall_share, self.chat_share = recall_share, chat_share
        self.lines = [f.text.splitlines(keepends=True) for f in files if len(f.text) > 4000]
        self.source = joined(vocabulary, [f.text + "<|endoftext|>" for f in files])
        self.chat = joined(vocabulary, chats(files))
        if not self.lines or len(self.chat) == 0:
            raise ValueError("the corpus holds no long file or no documented function: it is not a Python library")

    def windows(self, rng: np.random.Generator, batch: int, length: int) -> Ids:
        """(batch, length + 1) token ids: inputs and, shifted by one, labels."""
        return np.stack([self._window(rng, length + 1) for _ in range(batch)])

    def _window(self, rng: np.random.Generator, length: int) -> Ids:
        kind = rng.random()
        if kind < self.recall_share:
            return self._exercise(rng, length)
        return window(rng, self.chat if kind < self.recall_share + self.chat_share else self.source, length)

    def _exercise(self, rng: np.random.Generator, length: int) -> Ids:
        ids: list[int] = []
        while len(ids) < length:  # one long exercise or several short ones: short distances are learnt first
            lines = self.lines[int(rng.integers(len(self.lines)))]
            ids += self.vocabulary.encode(recall_exercise(rng, lines, int(rng.integers(300, 301 + 4 * length))))
        return np.array(ids[:length], np.int64)


def joined(vocabulary: Vocabulary, texts: list[str]) -> Ids:
    """All texts as one row of ids."""
    encoded = vocabulary.encode_all(texts)
    return np.concatenate([np.array(ids, np.int64) for ids in encoded]) if encoded else np.zeros(0, np.int64)


def window(rng: np.random.Generator, ids: Ids, length: int) -> Ids:
    """`length` consecutive ids from a random place; wraps around if there are fewer."""
    if len(ids) < length:
        ids = np.resize(ids, length)
    start = int(rng.integers(len(ids) - length + 1))
    return ids[start : start + length]


# ----------------------------------------------------------------------------------------------- held-out prompts
@dataclass(frozen=True)
class Prompt:
    """A held-out excerpt that ends at a line boundary, and what the file says next."""

    file: str
    text: str
    continuation: str


def held_out_prompts(files: list[SourceFile], count: int, seed: int) -> list[Prompt]:
    """`count` excerpts of 100 to 400 bytes with the next 540 bytes or so, spread over the held-out files."""
    rng = np.random.default_rng(seed)
    sources = [f for f in files if f.held_out and len(f.text) > 2000 and f.text.isascii()]
    prompts: list[Prompt] = []
    while len(prompts) < count:
        file = sources[int(rng.integers(len(sources)))]
        starts = line_starts(file.text, stop=len(file.text) - 1000)
        begin = int(rng.choice(starts))
        end = file.text.find("\n", begin + int(rng.integers(100, 280))) + 1
        text = file.text[begin:end]
        if 100 <= len(text) <= 400 and text.strip():
            prompts.append(Prompt(file.name, text, file.text[end : end + 540]))
    return prompts


def line_starts(text: str, stop: int) -> list[int]:
    return [0] + [i + 1 for i in range(stop) if text[i] == "\n"]


def recall_prompts(files: list[SourceFile], count: int, seed: int) -> Iterator[dict[str, object]]:
    """`count` prompts of 400 to 2600 bytes that end in a question whose answer stands `depth` bytes earlier."""
    rng = np.random.default_rng(seed)
    sources = [f for f in files if f.held_out and len(f.text) > 6000 and f.text.isascii()]
    for size in np.linspace(400, 2600, count).astype(int):
        text = sources[int(rng.integers(len(sources)))].text
        begin = int(rng.choice(line_starts(text, stop=len(text) - 3000)))
        body = text[begin : text.find("\n", begin + int(size)) + 1].splitlines(keepends=True)
        key, other = rng.choice(KEYS, size=2, replace=False)
        code, decoy = rng.integers(1000, 10_000, size=2)
        at = int(rng.integers(max(1, len(body) // 4)))
        body.insert(at, remember(key, int(code)))
        body.insert(int(rng.integers(at, len(body) + 1)), remember(other, int(decoy)))
        prompt = "".join(body) + recall(key, "").rstrip("\n")
        depth = len(prompt) - prompt.index(remember(key, int(code)))
        yield {"kind": "recall", "prompt": prompt, "key": str(key), "answer": str(code), "depth": depth}


def write_held_out(path: Path, prompts: list[Prompt], recalls: list[dict[str, object]]) -> None:
    """JSON lines: {"kind": "source", file, prompt, continuation} and {"kind": "recall", prompt, key, answer, depth}."""
    with path.open("w", encoding="utf-8") as out:
        for p in prompts:
            row = {"kind": "source", "file": p.file, "prompt": p.text, "continuation": p.continuation}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        for recall_row in recalls:
            out.write(json.dumps(recall_row, ensure_ascii=False) + "\n")
