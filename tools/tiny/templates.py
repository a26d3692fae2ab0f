"""Structured documents with little surprise in them: what a small draft can learn to propose many tokens of.

A document names its parts first and then works through them in order, so most of it follows from what is above.
Names are drawn without end; those whose hash says so occur in held-out documents only, and no others do there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 16  # one name in this many is kept for held-out documents
CONSONANTS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "st", "tr"]
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in "aeiou"]
WORDS = [
    "amber",
    "anchor",
    "apple",
    "arrow",
    "basil",
    "beacon",
    "bridge",
    "bronze",
    "cabin",
    "candle",
    "canyon",
    "cedar",
    "cellar",
    "cloud",
    "clover",
    "copper",
    "coral",
    "cotton",
    "crane",
    "crystal",
    "delta",
    "desert",
    "ember",
    "falcon",
    "feather",
    "fern",
    "field",
    "flint",
    "forest",
    "fox",
    "garden",
    "glacier",
    "grain",
    "granite",
    "harbor",
    "hazel",
    "heron",
    "hill",
    "honey",
    "island",
    "ivory",
    "jade",
    "juniper",
    "kettle",
    "lake",
    "lantern",
    "lemon",
    "lilac",
    "linen",
    "lotus",
    "magnet",
    "maple",
    "marble",
    "meadow",
    "mirror",
    "moon",
    "moss",
    "mountain",
    "nectar",
    "needle",
    "north",
    "oak",
    "ocean",
    "olive",
    "onyx",
    "opal",
    "orchid",
    "otter",
    "paper",
    "pearl",
    "pepper",
    "pine",
    "plum",
    "pocket",
    "pond",
    "poppy",
    "quartz",
    "rain",
    "raven",
    "reef",
    "ribbon",
    "river",
    "robin",
    "rocket",
    "saddle",
    "sage",
    "sail",
    "salt",
    "sand",
    "shell",
    "shore",
    "silver",
    "sky",
    "slate",
    "snow",
    "south",
    "sparrow",
    "spring",
    "spruce",
    "star",
    "stone",
    "storm",
    "summer",
    "sun",
    "thistle",
    "thunder",
    "tiger",
    "timber",
    "tower",
    "trail",
    "tulip",
    "tunnel",
    "valley",
    "velvet",
    "violet",
    "walnut",
    "water",
    "wheat",
    "willow",
    "wind",
    "window",
    "winter",
    "wolf",
    "wool",
]
FIELDS = [
    "age",
    "amount",
    "area",
    "author",
    "base",
    "batch",
    "capacity",
    "category",
    "color",
    "cost",
    "count",
    "degree",
    "depth",
    "distance",
    "duration",
    "energy",
    "factor",
    "flag",
    "grade",
    "group",
    "height",
    "index",
    "interval",
    "kind",
    "label",
    "length",
    "level",
    "limit",
    "mass",
    "mode",
    "name",
    "number",
    "offset",
    "order",
    "owner",
    "phase",
    "pitch",
    "power",
    "price",
    "quality",
    "quantity",
    "radius",
    "rank",
    "rate",
    "ratio",
    "region",
    "revision",
    "role",
    "score",
    "shape",
    "size",
    "source",
    "speed",
    "stage",
    "state",
    "status",
    "step",
    "target",
    "temperature",
    "title",
    "total",
    "type",
    "unit",
    "value",
    "version",
    "volume",
    "weight",
    "width",
    "zone",
]
ITEMS = [
    "apples",
    "beads",
    "books",
    "boxes",
    "buttons",
    "cards",
    "coins",
    "cups",
    "eggs",
    "keys",
    "lamps",
    "nails",
    "pears",
    "pens",
    "plums",
    "shells",
    "stamps",
    "stones",
]
KINDS = ["int", "str", "float", "bool"]


@dataclass(frozen=True)
class Document:
    """A text, the template that made it, and a sentence that asks for it."""

    kind: str
    request: str
    text: str


class Source:
    """Random choices for one document; `held_out` selects the names that may occur in it."""

    def __init__(self, rng: Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def stride(self) -> int:
        """A step that is easy to count in."""
        return self.rng.choice((1, 2, 5, 10))

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def some(self, values: list[str], low: int, high: int) -> list[str]:
        """Between `low` and `high` different values."""
        return self.rng.sample(values, self.rng.randint(low, high))

    def name(self) -> str:
        """An identifier: two words joined by an underscore, or an invented word."""
        while True:
            if self.rng.random() < 0.6:
                name = f"{self.rng.choice(WORDS)}_{self.rng.choice(WORDS)}"
            else:
                name = "".join(self.rng.choice(SYLLABLES) for _ in range(self.rng.randint(2, 3)))
            if is_held_out(name) == self.held_out:
                return name

    def names(self, low: int, high: int) -> list[str]:
        """Between `low` and `high` different identifiers."""
        found: dict[str, None] = {}
        count = self.rng.randint(low, high)
        while len(found) < count:
            found[self.name()] = None
        return list(found)


def is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def spoken(name: str) -> str:
    return name.replace("_", " ")


def listed(values: list[str]) -> str:
    """a, b and c."""
    return ", ".join(values[:-1]) + " and " + values[-1]


def typed_fields(s: Source, low: int, high: int) -> list[tuple[str, str]]:
    return [(field, s.pick(*KINDS)) for field in s.some(FIELDS, low, high)]


# --------------------------------------------------------------------------------------------------- Python code
def accessors(s: Source) -> Document:
    name, fields = s.name(), typed_fields(s, 3, 5)
    what, private = spoken(name), s.pick("_", "")
    prefix = s.pick("get_", "read_") if private else "get_"
    checks = s.rng.random() < 0.5
    lines = [
        f"class {camel(name)}:",
        f'    """A {what} with {listed([f for f, _ in fields])}."""',
        "",
        "    def __init__(self, " + ", ".join(f"{f}: {t}" for f, t in fields) + ") -> None:",
        *[f"        self.{private}{f} = {f}" for f, _ in fields],
        "",
    ]
    for f, t in fields:
        lines += [
            f"    def {prefix}{f}(self) -> {t}:",
            f'        """Return the {f} of the {what}."""',
            f"        return self.{private}{f}",
            "",
            f"    def set_{f}(self, {f}: {t}) -> None:",
            f'        """Set the {f} of the {what}."""',
        ]
        if checks:
            lines += [
                f"        if not isinstance({f}, {t}):",
                f'            raise TypeError(f"{f} must be {t}, not {{type({f}).__name__}}")',
            ]
        lines += [f"        self.{private}{f} = {f}", ""]
    request = f"Write a class `{camel(name)}` with getters and setters for {listed([f for f, _ in fields])}."
    return Document("accessors", request, "\n".join(lines))


def data_class(s: Source) -> Document:
    name, fields = s.name(), typed_fields(s, 3, 6)
    kind, variable = camel(name), s.pick("data", "row", "values")
    lines = ["@dataclass", f"class {kind}:", f'    """One {spoken(name)}."""', ""]
    lines += [f"    {f}: {t}" for f, t in fields]
    lines += ["", "    def to_dict(self) -> dict[str, object]:", "        return {"]
    lines += [f'            "{f}": self.{f},' for f, _ in fields]
    lines += ["        }", "", "    @classmethod", f"    def from_dict(cls, {variable}: dict[str, object]) -> {kind}:"]
    lines += ["        return cls(", *[f'            {f}={variable}["{f}"],' for f, _ in fields], "        )", ""]
    lines += [f"    def same_as(self, other: {kind}) -> bool:", "        return ("]
    lines += [f"            {'and ' if n else ''}self.{f} == other.{f}" for n, (f, _) in enumerate(fields)]
    lines += ["        )", "", "    def describe(self) -> str:", "        lines = []"]
    lines += [f'        lines.append(f"{f}: {{self.{f}}}")' for f, _ in fields]
    lines += ['        return "\\n".join(lines)', ""]
    request = f"Write a dataclass `{kind}` with {listed([f for f, _ in fields])}, to_dict and from_dict."
    return Document("data_class", request, "\n".join(lines))


def functions_and_tests(s: Source) -> Document:
    names, step = s.names(3, 5), s.number(2, 9)
    amounts = [s.number(1, 9) for _ in names]
    verb = s.pick("add", "raise", "shift")
    lines = []
    for name, amount in zip(names, amounts, strict=True):
        lines += [f"def {verb}_{name}(value: int) -> int:", f'    """Return value plus {amount}."""']
        lines += [f"    return value + {amount}", "", ""]
    lines += [f"class Test{camel(names[0])}(unittest.TestCase):"]
    for name, amount in zip(names, amounts, strict=True):
        lines.append(f"    def test_{verb}_{name}(self) -> None:")
        lines += [f"        self.assertEqual({verb}_{name}({n}), {n + amount})" for n in (0, 10, 10 * step)]
        lines.append("")
    request = f"Write functions {listed([f'`{verb}_{name}`' for name in names])} and their tests."
    return Document("functions_and_tests", request, "\n".join(lines))


def argument_checks(s: Source) -> Document:
    name, fields = s.name(), s.some(FIELDS, 3, 5)
    limits = [s.number(1, 9) * 10 for _ in fields]
    error = s.pick("ValueError", "OverflowError")
    lines = [f"# limits: {', '.join(f'{f} {limit}' for f, limit in zip(fields, limits, strict=True))}"]
    lines += [f"def check_{name}({', '.join(fields)}):", f'    """Raise {error} if an argument is out of range."""']
    for f, limit in zip(fields, limits, strict=True):
        lines += [f"    if {f} is None:", f'        raise TypeError("{f} must not be None")']
        lines += [f"    if {f} < 0:", f'        raise {error}("{f} must not be negative")']
        lines += [f"    if {f} > {limit}:", f'        raise {error}("{f} must be at most {limit}")']
    lines += ["", ""]
    for f in fields:
        lines += [f"def test_{name}_{f}_must_not_be_negative():", f"    with pytest.raises({error}):"]
        lines += [f"        check_{name}({', '.join(f'{g}={-1 if g == f else 0}' for g in fields)})", "", ""]
    request = f"Write `check_{name}`, which checks {listed(fields)}, and its tests."
    return Document("argument_checks", request, "\n".join(lines))


def command_line(s: Source) -> Document:
    name, options = s.name(), s.names(3, 5)
    defaults = [s.number(1, 9) for _ in options]
    lines = ["import argparse", "", "", "def main() -> None:"]
    lines.append(f'    parser = argparse.ArgumentParser(description="Run the {spoken(name)}.")')
    for option, default in zip(options, defaults, strict=True):
        flag = option.replace("_", "-")
        lines.append(f'    parser.add_argument("--{flag}", type=int, default={default}, help="the {spoken(option)}")')
    lines.append("    args = parser.parse_args()")
    lines += [f'    print("the {spoken(option)} is", args.{option})' for option in options]
    lines.append(f"    run_{name}(")
    lines += [f"        {option}=args.{option}," for option in options]
    lines += ["    )", "", "", f"def run_{name}({', '.join(options)}):"]
    for option in options:
        lines += [f"    for i in range({option}):", f'        print("{spoken(option)}", i, "of", {option})']
    request = f"Write a command line with the options {listed([o.replace('_', '-') for o in options])}."
    return Document("command_line", request, "\n".join([*lines, ""]))


def enumeration(s: Source) -> Document:
    name, members = s.name(), s.names(4, 7)
    kind = camel(name)
    lines = [f"class {kind}(Enum):", *[f"    {m.upper()} = {n}" for n, m in enumerate(members, 1)], "", ""]
    lines += [f"def name_of_{name}(value: {kind}) -> str:"]
    for m in members:
        lines += [f"    if value is {kind}.{m.upper()}:", f'        return "{spoken(m)}"']
    lines += ['    raise ValueError("unknown value")', "", "", f"def parse_{name}(text: str) -> {kind}:"]
    for m in members:
        lines += [f'    if text == "{spoken(m)}":', f"        return {kind}.{m.upper()}"]
    lines += ['    raise ValueError("unknown text")', ""]
    request = f"Write an enum `{kind}` of {listed([spoken(m) for m in members])} with names and a parser."
    return Document("enumeration", request, "\n".join(lines))


def registry(s: Source) -> Document:
    """Functions, a dictionary of them, and a loop's worth of calls."""
    names, suffix = s.names(4, 6), s.pick("handler", "worker", "reader", "filter")
    lines = [f"# {suffix}s: {', '.join(names)}"]
    for n in names:
        lines += [f"def {n}_{suffix}(items):", f'    print("{n} got", len(items), "items")', "    result = []"]
        lines += ["    for item in items:", f"        result.append(({n!r}, item))", "    return result", "", ""]
    lines += [f"{suffix.upper()}S = {{", *[f'    "{n}": {n}_{suffix},' for n in names], "}", ""]
    lines += [f'assert {suffix.upper()}S["{n}"]([1]) == [("{n}", 1)]' for n in names]
    request = f"Write {suffix}s for {listed(names)} and a dictionary of them."
    return Document("registry", request, "\n".join([*lines, ""]))


# ------------------------------------------------------------------------------------------------ rows and tables
def json_rows(s: Source) -> Document:
    names, group, fields = s.names(2, 5), s.name(), s.some(FIELDS, 2, 3)
    first, step, start = s.number(1, 9) * 100, s.stride(), [s.number(1, 9) * 10 for _ in fields]
    lines = ["["]
    for i in range(s.number(14, 22)):
        values = ", ".join(f'"{f}": {begin + i * step}' for f, begin in zip(fields, start, strict=True))
        lines.append(f'  {{"id": {first + i}, "group": "{group}", "name": "{names[i % len(names)]}", {values}}},')
    lines[-1] = lines[-1].rstrip(",")
    request = f"Give JSON rows of the group {group} with {listed(fields)}."
    return Document("json_rows", request, "\n".join([*lines, "]", ""]))


def sections(s: Source) -> Document:
    names, domain = s.names(5, 8), s.name().replace("_", "-")
    fields, values = s.some(FIELDS, 2, 4), [s.number(1, 99) for _ in range(4)]
    port = s.number(30, 90) * 100
    lines = [f"; sections: {', '.join(names)}"]
    for i, name in enumerate(names):
        lines += [f"[{name}]", f"host = {name.replace('_', '-')}.{domain}.example", f"port = {port + i}"]
        lines += [f"{f} = {v}" for f, v in zip(fields, values, strict=False)]
        lines += [f"log = /srv/{domain}/{name}.log", ""]
    return Document("sections", f"Write the configuration of {listed(names)}.", "\n".join(lines))


def markdown_table(s: Source) -> Document:
    names, columns = s.names(2, 5), s.some(FIELDS, 2, 3)
    step, start = [s.stride() for _ in columns], [s.number(10, 60) for _ in columns]
    lines = [f"## {spoken(s.name()).capitalize()}", "", f"| row | name | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for i in range(s.number(16, 26)):
        cells = " | ".join(str(a + i * d) for a, d in zip(start, step, strict=True))
        lines.append(f"| {i + 1} | {spoken(names[i % len(names)])} | {cells} |")
    return Document("markdown_table", f"Make a table with the columns {listed(columns)}.", "\n".join([*lines, ""]))


def log_lines(s: Source) -> Document:
    """A few services take turns; time and job numbers advance by constant steps."""
    services, time = s.names(2, 4), s.number(0, 80_000)
    step, job, size = s.stride(), s.number(100, 900), s.number(10, 99)
    date = f"20{s.number(10, 29)}-{s.number(10, 12)}-{s.number(10, 28)}"
    verbs = s.rng.sample(["started", "received", "checked", "stored", "sent", "finished"], s.number(2, 3))
    lines = []
    for _ in range(s.number(4, 6)):
        for service in services:
            for verb in verbs:
                clock = f"{time // 3600:02}:{time // 60 % 60:02}:{time % 60:02}"
                lines.append(f"{date} {clock} INFO {service}: job {job} {verb}, {size} bytes")
                time += step
        job += 1
    return Document("log_lines", f"Show the log of {listed(services)}.", "\n".join([*lines, ""]))


def sql_rows(s: Source) -> Document:
    table, columns, owners = s.name(), s.some(FIELDS, 2, 3), s.names(2, 4)
    lines = [f"CREATE TABLE {table} (", "    id INTEGER PRIMARY KEY,", "    owner TEXT NOT NULL,"]
    lines += [f"    {c} INTEGER NOT NULL," for c in columns]
    lines[-1] = lines[-1].rstrip(",")
    lines += [");"]
    start, step = [s.number(1, 50) for _ in columns], s.stride()
    for i in range(s.number(12, 18)):
        values = ", ".join(str(a + step * i) for a in start)
        owner = owners[i % len(owners)]
        lines.append(f"INSERT INTO {table} (id, owner, {', '.join(columns)}) VALUES ({i + 1}, '{owner}', {values});")
    return Document("sql_rows", f"Write SQL for a table {table} with {listed(columns)}.", "\n".join([*lines, ""]))


# ---------------------------------------------------------------------------------------------------------- prose
def daily_sums(s: Source) -> Document:
    """A worked addition a day: each starts from the result of the day before."""
    who, item = camel(s.name()), s.pick(*ITEMS)
    have, more = s.number(1, 60), s.number(2, 9)
    verb = s.pick("buys", "finds", "gets")
    plan = f"{who} has {have} {item} and {verb} {more} more every day."
    lines = [plan, ""]
    for day in range(1, s.number(10, 14)):
        lines.append(f"Day {day}: {who} has {have} {item} and {verb} {more} more. How many {item} does {who} have now?")
        lines.append(f"{have} + {more} = {have + more}. The answer is {have + more}.")
        lines.append("")
        have += more
    return Document("daily_sums", f"{plan} Count the {item}.", "\n".join(lines))


def facts_and_questions(s: Source) -> Document:
    """Facts about places, then one question for each, answered in the same order."""
    names, place = s.names(5, 8), s.pick("room", "drawer", "shelf", "box", "row")
    numbers = [s.number(10, 99) for _ in names]
    pairs = list(zip([spoken(n) for n in names], numbers, strict=True))
    lines = [f"The {n} is in {place} {number}." for n, number in pairs]
    lines.append("")
    for n, number in pairs:
        lines += [f"Question: Where is the {n}?", f"Answer: The {n} is in {place} {number}.", ""]
    for n, number in pairs:
        lines += [f"Question: What is in {place} {number}?", f"Answer: The {n} is in {place} {number}.", ""]
    return Document("facts_and_questions", f"Where are the {listed([n for n, _ in pairs])}?", "\n".join(lines))


def countdown(s: Source) -> Document:
    what, place, step = spoken(s.name()), spoken(s.name()), s.number(1, 3)
    left = s.number(15, 60)
    lines: list[str] = []
    while left > step and len(lines) < 36:
        lines += [f"{left} {what} lamps by the {place},", f"{left} {what} lamps.", f"Take {step} down, pass it around,"]
        left -= step
        lines += [f"{left} {what} lamps by the {place}.", ""]
    return Document("countdown", f"Count down the {what} lamps by the {place}.", "\n".join(lines))


def steps_and_checks(s: Source) -> Document:
    """Numbered steps, then a checklist that repeats them."""
    project, names = spoken(s.name()), [spoken(n) for n in s.names(4, 6)]
    verb, done = s.rng.choice([("Open", "opened"), ("Clean", "cleaned"), ("Paint", "painted"), ("Test", "tested")])
    lines = [f"# The {project}", "", "## Steps", ""]
    lines += [f"{i}. {verb} the {n}." for i, n in enumerate(names, 1)]
    for i, n in enumerate(names, 1):
        lines += ["", f"## Step {i}: {verb.lower()} the {n}", ""]
        lines += [f"{verb} the {n} and write down the result.", f"The {n} must be {done} before step {i + 1} begins."]
    lines += ["", "## Checklist", "", *[f"- [ ] the {n} is {done}" for n in names], ""]
    return Document("steps_and_checks", f"Explain how the {project} is {done}.", "\n".join(lines))


Template = Callable[[Source], Document]
TEMPLATES: tuple[Template, ...] = (
    accessors,
    data_class,
    functions_and_tests,
    argument_checks,
    command_line,
    enumeration,
    registry,
    json_rows,
    sections,
    markdown_table,
    log_lines,
    sql_rows,
    daily_sums,
    facts_and_questions,
    countdown,
    steps_and_checks,
)


def document(rng: Random, held_out: bool = False) -> Document:
    """A random document of a random template; the same generator state gives the same document."""
    return rng.choice(TEMPLATES)(Source(rng, held_out))


def documents(seed: int, characters: int, held_out: bool = False) -> list[Document]:
    """Random documents of at least `characters` together."""
    rng, found, size = Random(seed), [], 0
    while size < characters:
        found.append(document(rng, held_out))
        size += len(found[-1].text)
    return found
