"""The text that the tiny pair learns: generated documents, Python's standard library, recall exercises, short chats.

A file belongs to the held-out set if its sha256 says so, so the split does not depend on order or on other files.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from pydflash.files import replacing
from tools.tiny import templates
from tools.tiny.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]

JOB_CHARACTERS = 1_000_000  # of generated text a process makes at a time
CONTINUATION = 420  # bytes kept of what follows a held-out prompt
GENERATED = "generated/"  # stands before the template's name where a library prompt has its file
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


# ------------------------------------------------------------------------------------------------------ streams
@dataclass(frozen=True)
class Stream:
    """Texts as one row of token ids, and where each text begins."""

    ids: npt.NDArray[np.uint16]
    starts: Ids

    def window(self, rng: np.random.Generator, length: int) -> Ids:
        """`length` consecutive ids from a random place."""
        return window(rng, self.ids, length)

    def opening(self, rng: np.random.Generator, length: int) -> Ids:
        """`length` ids from the beginning of a random text on; they may run into the next text."""
        fitting = np.searchsorted(self.starts, len(self.ids) - length, side="right")
        if fitting == 0:
            return self.window(rng, length)
        start = self.starts[int(rng.integers(fitting))]
        return self.ids[start : start + length].astype(np.int64)


def stream(vocabulary: Vocabulary, texts: list[str]) -> Stream:
    """`texts` one after the other; raises ValueError if the vocabulary has ids beyond 16 bits."""
    if len(vocabulary.tokens) > 1 << 16:
        raise ValueError(f"{len(vocabulary.tokens)} tokens do not fit in 16 bits")
    encoded = [np.array(ids, np.uint16) for ids in vocabulary.encode_all(texts)]
    return chained([Stream(ids, np.zeros(1, np.int64)) for ids in encoded if len(ids)])


def chained(streams: list[Stream]) -> Stream:
    ends = np.cumsum([0] + [len(s.ids) for s in streams])
    starts = [s.starts + end for s, end in zip(streams, ends, strict=False)]
    empty = (np.zeros(0, np.uint16), np.zeros(0, np.int64))
    return Stream(np.concatenate([empty[0], *(s.ids for s in streams)]), np.concatenate([empty[1], *starts]))


def joined(vocabulary: Vocabulary, texts: list[str]) -> Ids:
    """All texts as one row of ids."""
    return stream(vocabulary, texts).ids.astype(np.int64)


def window(rng: np.random.Generator, ids: npt.NDArray[np.integer], length: int) -> Ids:
    """`length` consecutive ids from a random place; wraps around if there are fewer."""
    if len(ids) < length:
        ids = np.resize(ids, length)
    start = int(rng.integers(len(ids) - length + 1))
    return ids[start : start + length].astype(np.int64)


def generated_texts(seed: int, characters: int) -> list[str]:
    return [d.text + "<|endoftext|>" for d in templates.documents(seed, characters)]


def generated_chats(seed: int, characters: int) -> list[str]:
    """ChatML dialogues: the user describes a document, the assistant writes it."""
    return [
        f"<|im_start|>user\n{d.request}<|im_end|>\n<|im_start|>assistant\n{d.text}<|im_end|>\n<|endoftext|>"
        for d in templates.documents(seed, characters)
    ]


def exercises(seed: int, characters: int, longest: int, files: list[SourceFile]) -> list[str]:
    """Recall exercises of 300 to `longest` characters, half of them in library source, half in generated text."""
    rng = np.random.default_rng(seed)
    sources = [f.text.splitlines(keepends=True) for f in files if len(f.text) > 4000]
    if not sources:
        raise ValueError("the corpus holds no long file: it is not a Python library")
    texts: list[str] = []
    while characters > 0:
        size = int(rng.integers(300, longest))
        lines = sources[int(rng.integers(len(sources)))]
        if rng.random() < 0.5:
            generated = templates.documents(int(rng.integers(1 << 62)), 2 * size)
            lines = "\n".join(d.text for d in generated).splitlines(keepends=True)
        texts.append(recall_exercise(rng, lines, size))
        characters -= len(texts[-1])
    return texts


@dataclass(frozen=True)
class Job:
    """One part of the training text, made and tokenised by one process."""

    kind: str  # "generated", "chat" or "recall"
    seed: int
    characters: int
    longest: int
    files: list[SourceFile]

    def texts(self) -> list[str]:
        if self.kind == "recall":
            return exercises(self.seed, self.characters, self.longest, self.files)
        return (generated_chats if self.kind == "chat" else generated_texts)(self.seed, self.characters)


def run_job(vocabulary: Vocabulary, job: Job) -> Stream:
    return stream(vocabulary, job.texts())


def run_jobs(vocabulary: Vocabulary, jobs: list[Job], processes: int) -> list[Stream]:
    """Streams of `jobs` in their order. Forks, so no accelerator may be in use yet."""
    work = partial(run_job, vocabulary)
    if processes <= 1:
        return [work(job) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        return list(pool.map(work, jobs))


# ------------------------------------------------------------------------------------------------------ batches
@dataclass(frozen=True)
class Shares:
    """Share of windows of each kind; the rest is generated text."""

    source: float
    recall: float
    chat: float


class Mixture:
    """The training text as token streams, from which windows are drawn."""

    def __init__(
        self,
        files: list[SourceFile],
        vocabulary: Vocabulary,
        *,
        characters: int,
        longest_exercise: int,
        processes: int,
        seed: int,
    ) -> None:
        """Make about `characters` of generated text, a quarter as much of recall exercises and a tenth of dialogues."""
        plan = {"generated": characters, "recall": characters // 4, "chat": characters // 10}
        jobs: list[Job] = []
        for kind, size in plan.items():
            parts = max(1, round(size / JOB_CHARACTERS))
            needed = files if kind == "recall" else []  # nobody else needs them, and they are copied to a process
            for _ in range(parts):
                jobs.append(Job(kind, seed * 1000 + len(jobs), size // parts, longest_exercise, needed))
        streams = run_jobs(vocabulary, jobs, processes)
        parts_of = {k: [s for s, job in zip(streams, jobs, strict=True) if job.kind == k] for k in plan}
        self.generated, self.recall = chained(parts_of["generated"]), chained(parts_of["recall"])
        self.chat = chained([*parts_of["chat"], stream(vocabulary, chats(files))])
        self.source = stream(vocabulary, [f.text + "<|endoftext|>" for f in files])

    def windows(self, rng: np.random.Generator, shares: Shares, batch: int, length: int) -> Ids:
        """(batch, length + 1) token ids: inputs and, shifted by one, labels."""
        rows = [self._stream(rng, shares) for _ in range(batch)]
        # An exercise is taken from its beginning, so that what it asks for has been said.
        return np.stack([(s.opening if s is self.recall else s.window)(rng, length + 1) for s in rows])

    def prompts(self, rng: np.random.Generator, shares: Shares, batch: int, length: int) -> Ids:
        """(batch, length) token ids; all but library source from the beginning of a text on."""
        rows = [self._stream(rng, shares) for _ in range(batch)]
        return np.stack([(s.window if s is self.source else s.opening)(rng, length) for s in rows])

    def _stream(self, rng: np.random.Generator, shares: Shares) -> Stream:
        kind = rng.random()
        if kind < shares.source:
            return self.source
        if kind < shares.source + shares.recall:
            return self.recall
        return self.chat if kind < shares.source + shares.recall + shares.chat else self.generated


# ----------------------------------------------------------------------------------------------- held-out prompts
@dataclass(frozen=True)
class Prompt:
    """A held-out excerpt that ends at a line boundary, and what the file says next."""

    file: str
    text: str
    continuation: str

    @property
    def generated(self) -> bool:
        return self.file.startswith(GENERATED)


def held_out_prompts(files: list[SourceFile], count: int, seed: int) -> list[Prompt]:
    """`count` prompts of 100 to 400 bytes with the next 420 bytes: every fifth from a library file."""
    rng, words = np.random.default_rng(seed), Random(seed)
    sources = [f for f in files if f.held_out and len(f.text) > 2000 and f.text.isascii()]
    return [library_prompt(rng, sources) if n % 5 == 0 else generated_prompt(words) for n in range(count)]


def library_prompt(rng: np.random.Generator, sources: list[SourceFile]) -> Prompt:
    """An excerpt from anywhere in a held-out file."""
    while True:
        file = sources[int(rng.integers(len(sources)))]
        starts = line_starts(file.text, stop=len(file.text) - 1000)
        begin = int(rng.choice(starts))
        end = file.text.find("\n", begin + int(rng.integers(100, 280))) + 1
        text = file.text[begin:end]
        if 100 <= len(text) <= 400 and text.strip():
            return Prompt(file.name, text, file.text[end : end + CONTINUATION])


def generated_prompt(rng: Random) -> Prompt:
    """The beginning of a generated document with held-out names."""
    while True:
        document = templates.document(rng, held_out=True)
        end = document.text.find("\n", rng.randint(180, 330)) + 1
        if 100 <= end <= 400:
            return Prompt(GENERATED + document.kind, document.text[:end], document.text[end : end + CONTINUATION])


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
    rows: list[dict[str, object]] = [
        {"kind": "source", "file": p.file, "prompt": p.text, "continuation": p.continuation} for p in prompts
    ]
    with replacing(path) as out:
        for row in rows + recalls:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
