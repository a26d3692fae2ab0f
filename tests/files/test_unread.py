"""Patterns of names, and the refusal of what they do not match."""

from __future__ import annotations

from pathlib import Path

import pytest

from pydflash.errors import ConfigError, LoadError, UnsupportedModel
from pydflash.files import check_patterns, matcher, patterns_by_file, refuse_unread
from tests.tiny import GEOMETRIES, write_draft, write_target


@pytest.mark.parametrize(
    ("patterns", "matched"),
    [
        ((), []), (("a.*",), ["a.b", "a.[x]"]), (("*",), ["a.b", "A.b", "a.[x]"]), (("a.?",), ["a.b"]),
        (("[aA].b",), ["a.b", "A.b"]), (("a.b", "A.*"), ["a.b", "A.b"]), (("a",), []), (("b",), []), (("[",), []),
    ],
)  # fmt: skip
def test_a_pattern_matches_whole_names(patterns: tuple[str, ...], matched: list[str]) -> None:
    assert list(filter(matcher(patterns), ["a.b", "A.b", "a.[x]"])) == matched


def test_a_single_pattern_is_one_and_each_has_to_match() -> None:
    assert check_patterns("a.*", "f", ["a.b"]) == ("a.*",)
    assert check_patterns(["a.*", "b"], "f", ["a.b", "b"]) == ("a.*", "b")
    assert check_patterns((), "f", []) == ()
    with pytest.raises(ConfigError, match="ignore has 'c', which matches nothing in f"):
        check_patterns(["a.*", "c"], "f", ["a.b"])


def test_each_file_gets_its_patterns(tmp_path: Path) -> None:
    target = write_target(tmp_path / "t.gguf", GEOMETRIES["equal"])
    draft = write_draft(tmp_path / "d.gguf", GEOMETRIES["equal"])
    both = ("fc.*", "*ssm_a", "general.name")
    assert patterns_by_file(both, [target, draft]) == [("*ssm_a", "general.name"), ("fc.*", "general.name")]
    assert patterns_by_file((), [tmp_path / "none.gguf"]) == [()]
    with pytest.raises(LoadError, match=r"none\.gguf"):
        patterns_by_file(("x",), [tmp_path / "none.gguf"])


def test_the_refusal_names_the_first_counts_the_others_and_offers_a_pattern() -> None:
    names = ["blk.12.a.bias", "b", "c"]
    assert refuse_unread("f", "x", names, ("*",), repr) == ("blk.12.a.bias", "b", "c")
    assert refuse_unread("f", "x", [], (), repr) == ()
    with pytest.raises(
        UnsupportedModel, match=r"^f: 'blk\.12\.a\.bias' is not used by x, nor is 1 other; .*'blk\.\*\.a"
    ):
        refuse_unread("f", "x", names, ("b",), repr)
