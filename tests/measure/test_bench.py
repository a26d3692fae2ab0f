"""``pydflash bench`` measures what it names, with the settings it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pydflash import cli
from pydflash.config import EngineConfig
from pydflash.engine import Engine
from pydflash.errors import ConfigError
from pydflash.measure import bench
from pydflash.measure.bench import Plan, Report, Result, decode_results, decode_speed, prefill_results, random_ids
from pydflash.models import load_model
from pydflash.runtime import Session

CONFIG = EngineConfig(device="cpu", threads=1, max_context=256)


def test_the_command_names_its_results_like_llama_bench(
    target_path: Path, draft_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.jsonl"
    command = ["bench", str(target_path), "--draft", str(draft_path), "--device", "cpu", "--threads", "1"]
    command += ["-p", "24", "-p", "40", "-n", "4", "--depth", "0", "--depth", "20", "-r", "2", "--draft-max", "3"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--cache-k", "q8_0", "--json", str(path)])
    assert not ended.value.code
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [f"cycle 3/{kept} {part}" for kept in (0, 3) for part in ("total", "draft", "verify", "rest")]
    assert [row["what"] for row in rows] == ["pp24", "pp40", "tg4@0", "fill20", "tg4@20", *parts]
    out = capsys.readouterr().out
    for row in rows:
        assert row["what"] in out
        assert row["unit"] == ("ms" if row["what"].startswith("cycle") else "tok/s")
        assert 0 < row["low"] <= row["median"] <= row["high"]
        settings = row["settings"]
        assert (settings["cache"], settings["cache_k"], settings["threads"]) == ("q8_0-f16", "q8_0", 1)
        assert {"model", "draft", "device", "date", "version", "k_rotation", "chunk"} <= set(settings)
    assert [len(row["values"]) for row in rows] == [2, 2, 2, 1, 2, *[bench.CYCLES] * 8]


def test_nothing_is_measured_where_0_tokens_are_asked_for(
    target_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.bench(target_path, None, CONFIG, Plan((0,), 0)) == []
    assert [result.what for result in bench.bench(target_path, None, CONFIG, Plan((0,), 2, repeats=1))] == ["tg2@0"]
    assert "tg2@0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ({"prompts": (-1,)}, "prompt_tokens is -1"),
        ({"steps": -1}, "max_tokens"),
        ({"depths": (0, -5)}, "depth is -5"),
        ({"repeats": 0}, "repeats is 0; allowed: 1"),
    ],
)
def test_a_plan_out_of_range_is_refused(plan: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Plan(**plan)  # type: ignore[arg-type]


def test_every_repeat_of_a_prefill_has_another_prompt(target_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    feed = bench.feed

    def recorded(session: Session, ids: list[int]) -> int:
        assert session.length == 0
        seen.append(tuple(ids))
        return feed(session, ids)

    monkeypatch.setattr(bench, "feed", recorded)
    with load_model(target_path, "cpu", threads=1) as model:
        (result,) = prefill_results(model, CONFIG, [20], 3)
    assert len(result.values) == 3
    assert len(set(seen)) == len(seen) == bench.WARM_UPS + 3
    assert {len(ids) for ids in seen} == {20}


def test_decoding_goes_on_from_the_depth_one_token_at_a_time(target_path: Path) -> None:
    with load_model(target_path, "cpu", threads=1) as model, Engine.share(model, None, CONFIG) as engine:
        bench.feed(engine.session, random_ids(model.config.vocab, 30))
        before = engine.session.serial
        assert len(decode_speed(engine.session, 5, 2)) == 2
        assert engine.session.length == 30 + bench.WARM_CYCLES + 2 * 5
        assert engine.session.serial - before == bench.WARM_CYCLES + 2 * 5


def test_a_measurement_runs_with_the_settings_it_is_given(target_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EngineConfig] = []
    share = Engine.share

    def recorded(model, draft, config):  # type: ignore[no-untyped-def]
        configs.append(config)
        return share(model, draft, config)

    monkeypatch.setattr(Engine, "share", recorded)
    given = EngineConfig(device="cpu", threads=1, cache_k="q4_0", cache_v="q8_0", k_rotation="none", chunk=32)
    with load_model(target_path, "cpu", threads=1) as model:
        results = [*prefill_results(model, given, [20], 1), *decode_results(model, given, 2, [8], 1)]
    assert [(c.cache_k, c.cache_v, c.k_rotation, c.chunk) for c in configs] == [("q4_0", "q8_0", "none", 32)] * 2
    assert [c.max_context for c in configs] == [20, 8 + bench.WARM_CYCLES + 2]
    assert {result.settings["cache"] for result in results} == {"q4_0-q8_0"}


def test_a_result_is_on_disk_when_it_is_known(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.jsonl", model="m")
    report.add(Result("pp1", "tok/s", [3.0, 1.0, 2.0], {"chunk": 32}))
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (row["median"], row["mean"], row["low"], row["high"]) == (2.0, 2.0, 1.0, 3.0)
    assert row["settings"] == {"model": "m", "chunk": 32}
