"""Does every chat template end within its limits, whatever it was written to do?

    python -m benchmarks.hostile_templates
    python -m benchmarks.hostile_templates --only "slice sort batch" --jobs 1

Renders about a hundred templates that ask for any amount of time or memory, each in a Python process of its own, and
prints what each took there and in its child process. Exits with 1 when one took more than --most-seconds or
--most-memory, or raised anything but TemplateError.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydflash.errors import TemplateError
from pydflash.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]


def repeated(step: str, turns: int = 60, start: str = "'xx'") -> str:
    return f"{{% set n = namespace(v={start}) %}}{{% for i in range({turns}) %}}{{% set n.v = {step} %}}{{% endfor %}}"


def shared(depth: int, item: str = "n.v, n.v") -> str:
    """A list of two references to a list of two references ...: 2 ** depth leaves in ``depth`` small lists."""
    return repeated(f"[{item}]", depth, "1")


def large(items: int = 1 << 24) -> str:
    """A list with many items, which costs 8 bytes for each."""
    return f"{{% set many = [1] * {items} %}}"


DEEP = repeated("[n.v]", 90_000, "1")
NINES = "9" * 12

HOSTILE = {
    # Filters that count to a number that the template names.
    "slice": "{{ [1]|slice(10**12)|list }}",
    "slice in a loop": "{% for x in 'ab'|slice(10**12) %}{% endfor %}",
    "slice filled": "{{ [1]|slice(10**9, 'x')|list|length }}",
    "batch filled": "{{ [1]|batch(10**10, 0)|list }}",
    "batch by one": large() + "{{ many|batch(1)|list }}",
    "round": "{{ 1.5|round(10**9, 'ceil') }}",
    "round floor": "{{ 1|round(10**8, 'floor') }}",
    "round common": "{{ (10**5000)|round(-(10**9)) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "indent": "{{ ('a\\n' * 10**6)|indent(10**4) }}",
    "indent twice": "{{ ('\\n' * 2**24)|indent(64, true, true)|indent(64, true, true) }}",
    "wordwrap": "{{ ('a ' * 2**24)|wordwrap(1)|wordwrap(1)|wordwrap(1) }}",
    "wordwrap by text": "{{ ('a ' * 2**22)|wordwrap(1, wrapstring='x' * 10**5) }}",
    "truncate": "{{ ('a' * 2**30)|truncate(2**29) }}",
    "filesizeformat": "{{ (10**300000)|filesizeformat }}",
    "pprint": shared(40) + "{{ n.v|pprint }}",
    "urlize": "{{ ('http://a.b ' * 10**7)|urlize }}",
    "xmlattr": "{{ {'a': 'b' * 2**28}|xmlattr }}",
    "striptags": "{{ ('<a>' * 2**23)|striptags }}",
    "striptags of comments": "{{ ('<!---->' * 2**23)|striptags }}",
    "striptags of words": "{{ ('a ' * 2**26)|striptags }}",
    "title": "{{ ('a ' * 2**24)|title }}",
    "wordcount": "{{ ('a ' * 2**26)|wordcount }}",
    "urlencode": "{{ ('\u20ac' * 2**26)|urlencode }}",
    "escape": "{{ ('<' * 2**28)|escape }}",
    "forceescape": repeated("(n.v|forceescape) * 2", 60, "'&'"),
    "replace": repeated("n.v|replace('x', n.v)"),
    "replace nothing": repeated("n.v|replace('', n.v)"),
    "join": repeated("n.v|join(n.v)"),
    "format": "{{ '%9999999999d'|format(1) }}",
    "format many": "{{ ('%9999d' * 10**6) % ((1,) * 10**6) }}",
    "format star": "{{ '%*d'|format(10**10, 1) }}",
    "format precision": "{{ '%.999999999f'|format(1.5) }}",
    "json indent": "{{ [[1]]|tojson(indent=10**10) }}",
    "json separators": "{{ ([1] * 10**6)|tojson(separators=('x' * 10**6, ':')) }}",
    # Filters over many items.
    "sort": large() + "{{ many|sort }}",
    "sort again": large() + "{% for i in range(99999) %}{% set x = many|sort %}{% endfor %}",
    "map": large() + "{{ many|map('string')|map('length')|sum }}",
    "sum": large() + "{% for i in range(99999) %}{% set x = many|sum %}{% endfor %}",
    "sum of lists": "{{ ([[1] * 10000] * 10000)|sum(start=[])|length }}",
    "unique": "{{ range(99999)|map('string')|list|batch(1)|list|map('join')|unique|list * 10**6 }}",
    "groupby": large() + "{{ many|groupby('real') }}",
    "min": large() + "{% for i in range(99999) %}{% set x = many|min %}{% endfor %}",
    "reverse": "{{ ('ab' * 2**29)|reverse }}",
    "select": large() + "{{ many|select('odd')|list|length }}{{ many|select('in', many)|list }}",
    "reject": large() + "{% for i in range(99999) %}{% set x = many|reject('even')|list %}{% endfor %}",
    "list of text": "{{ ('a' * 2**29)|list }}",
    "dictsort": repeated("n.v|dictsort|length and n.v", 99_999, "dict.fromkeys(range(99999))"),
    "random": large() + "{% for i in range(99999) %}{% set x = (many|list)|random %}{% endfor %}",
    "count": large(1 << 22) + "{% for i in range(99999) %}{% set x = many.count(2) %}{% endfor %}",
    "index": large() + "{% for i in range(99999) %}{% set x = 2 in many %}{% endfor %}",
    "items": "{% for i in range(99999) %}{% for k in dict.fromkeys(range(99999))|items %}{% endfor %}{% endfor %}",
    # Small lists with endless contents.
    "shared to text": shared(40) + "{{ n.v }}",
    "shared to text, deep": shared(200) + "{{ n.v|string|length }}",
    "shared to JSON": shared(40) + "{{ n.v|tojson }}",
    "shared to JSON, indented": shared(40) + "{{ n.v|tojson(indent=64) }}",
    "shared compared": shared(40) + "{% set a = n.v %}" + shared(40) + "{{ a == n.v }}",
    "shared ordered": shared(40) + "{% set a = n.v %}" + shared(40) + "{{ a <= n.v }}",
    "shared searched": shared(40) + "{% set a = n.v %}" + shared(40) + "{{ a in [n.v] }}",
    "shared tuples hashed": repeated("(n.v, n.v)", 40, "1") + "{{ {n.v: 1} }}",
    "shared tuples grouped": repeated("(n.v, n.v)", 40, "1") + "{{ [n.v]|unique|list }}",
    "shared dicts": repeated("{'a': n.v, 'b': n.v}", 40, "1") + "{{ n.v }}",
    "shared dicts to JSON": repeated("{'a': n.v, 'b': n.v}", 40, "1") + "{{ n.v|tojson(sort_keys=true) }}",
    "shared joined": shared(40) + "{{ n.v|join }}",
    "shared in a format": shared(40) + "{{ '%s' % (n.v,) }}",
    "shared in str.format": shared(40) + "{{ '{}'.format(n.v) }}",
    "shared by the middle": repeated("[n.v] * 10", 20, "1") + "{{ n.v|string }}",
    "deep to text": DEEP + "{{ n.v }}",
    "deep to JSON": DEEP + "{{ n.v|tojson }}",
    "deep compared": DEEP + "{{ n.v == [n.v] }}",
    # Methods of values.
    "bytes ljust": "{{ 'a'.encode().ljust(10**10) }}",
    "bytes center": "{{ 'a'.encode().center(2**40)|length }}",
    "bytes zfill": "{{ 'a'.encode().zfill(10**10) }}",
    "bytes expandtabs": "{{ '\\t'.encode().expandtabs(10**10) }}",
    "bytes join": "{{ ('a' * 10**6).encode().join(['b'.encode()] * 10**6) }}",
    "bytes replace": repeated("n.v.replace('x'.encode(), n.v)", 60, "'xx'.encode()"),
    "bytes hex": "{{ ('a' * 2**29).encode().hex() }}",
    "int to bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "int from text": "{{ ('1' * 2**30)|int }}",
    "str ljust": "{{ 'a'.ljust(10**10) }}",
    "str zfill": "{{ 'a'.zfill(10**10) }}",
    "str expandtabs": "{{ '\\t'.expandtabs(10**10) }}",
    "str translate": "{{ ('a' * 2**20).translate({97: 'b' * 2**20}) }}",
    "str split": "{{ ('a ' * 2**27).split() }}",
    "str partition": repeated("n.v.partition('x')|join * 2", 60),
    "str count": "{% set s = 'a' * 10**7 %}{% for i in range(9999) %}{% set x = s.count('a' * 99 ~ 'b') %}{% endfor %}",
    "str find": "{% set s = 'a' * 10**7 %}{{ s.rfind('b' ~ 'a' * 5 * 10**6) }}" * 1000 + "{{ 1 / 0 }}",
    "str format width": "{{ '{:10000000000}'.format(1) }}",
    "str format nested": "{{ '{:{}}'.format(1, 10**10) }}",
    "str splitlines": "{{ ('\\n' * 2**28).splitlines() }}",
    # Operators.
    "times": "{{ 'x' * 10**11 }}",
    "times in steps": repeated("n.v * 1000"),
    "list times": "{{ [0] * 10**11 }}",
    "plus": repeated("n.v + n.v"),
    "tilde": repeated("n.v ~ n.v"),
    "power": f"{{{{ 9 ** {NINES} }}}}",
    "squares": repeated("n.v * n.v", 60, "3"),
    "floor division": "{{ 10**(10**9) // 3**(10**8) }}",
    "remainder": "{{ 7**(10**9) % 3**(10**8) }}",
    "number to text": "{{ 2**16000 }}{{ (2**16000)|string }}",
    # Time alone.
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [60] recursive %}{{ loop([x - 1, x - 1]) if x else '' }}{% endfor %}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "call blocks": "{% macro m(n) %}{{ caller() if n }}{% endmacro %}" + "{% for i in range(99999) %}" * 4
    + "{% call m(1) %}x{% endcall %}" + "{% endfor %}" * 4,
    "output": "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "output at once": "{{ 'x' * 2**29 }}",
    "output of wide characters": "{% for i in range(99999) %}{{ '\U0001f600' * 10000 }}{% endfor %}",
    "set block": "{% for i in range(99999) %}{% set x %}{{ 'x' * 10**7 }}{{ i }}{% endset %}{% endfor %}",
    "kept": repeated("n.v + [range(99999)|list]", 99_999, "[]"),
    "cycler": "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{% for j in range(99999) %}{{ c.next() if 0 }}"
    "{% endfor %}{% endfor %}",
    # The compiler.
    "blocks": "".join(f"{{% block b{i} %}}{{% endblock %}}" for i in range(30_000)) + "{{ 1 / 0 }}",
    "nested ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000 + "{{ 1 / 0 }}",
    "parentheses": "{{ " + "(" * 200_000 + ")" * 200_000 + " }}",
    "long sum": "{{ " + "+".join(["1"] * 100_000) + " }}{{ 1 / 0 }}",
    "constants": "{{ '" + "x" * 9 + "' * 10**10 }}",
    "folded power": "{{ 9 ** (9 ** 9) }}",
    "folded filter": "{{ 'x'|center(10**10) }}",
    "many names": "".join(f"{{% set a{i} = 1 %}}" for i in range(50_000)) + "{{ 1 / 0 }}",
}  # fmt: skip


def once(name: str) -> dict[str, Any]:
    """Render one template: what it said, how long it took, and the most memory (MiB) of this process and its child."""
    begin = time.perf_counter()
    try:
        with ChatTemplate(HOSTILE[name]) as template:
            said = f"a text of {len(template.render(MESSAGES)):,} characters"
    except TemplateError as error:
        said = str(error)
    seconds = time.perf_counter() - begin
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"name": name, "seconds": seconds, "own": own >> 10, "child": child >> 10, "said": said}


def in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.hostile_templates", "--once", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"name": name, "seconds": 120, "own": 0, "child": 0, "said": "HANGS"}
    if done.returncode:
        return {"name": name, "seconds": 0, "own": 0, "child": 0, "said": f"FAULT {done.stderr[-500:]}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="render only templates whose name has one of these words")
    parser.add_argument("--jobs", type=int, default=2, help="templates at a time (default 2)")
    parser.add_argument("--most-seconds", type=float, default=12.0, help="longest time allowed (default 12)")
    parser.add_argument("--most-memory", type=int, default=1024, help="most MiB of a process allowed (default 1024)")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once)))
        return 0
    words = (args.only or "").split()
    names = [name for name in HOSTILE if not words or any(word in name for word in words)]
    faults = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(in_a_process, names):
            most = max(row["own"], row["child"])
            ended = row["said"].startswith(("the chat template", "a text"))
            fault = not ended or row["seconds"] > args.most_seconds or most > args.most_memory
            faults += fault
            print(
                f"{'FAULT ' if fault else ''}{row['name']:28} {row['seconds']:6.2f} s {row['own']:5} MiB "
                f"{row['child']:5} MiB  {row['said'][:150]}",
                flush=True,
            )
    print(f"{len(names)} templates, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
