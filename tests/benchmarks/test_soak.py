"""The soak kills, resumes and compares; a short one finds a run limited by epochs equal to the unbroken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import soak


def write_run(log_dir: Path, version: int, lines: dict[int, float]) -> Path:
    run = log_dir / "name" / f"version_{version}"
    run.mkdir(parents=True)
    rows = [{"step": step, "loss": loss, "step_seconds": version} for step, loss in lines.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_lines_are_compared_without_what_the_machine_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0, {1: 0.5, 2: 0.25})
    assert soak.lines_of(run) == {1: {"step": 1, "loss": 0.5}, 2: {"step": 2, "loss": 0.25}}
    assert [path.name for path in soak.versions(tmp_path)] == ["version_0"]


def test_differences_failures_and_memory_decide() -> None:
    fine = soak.Soak(runs=1, rss={"unbroken": 100.0, "broken": 110.0})
    assert fine.summary()["ok"]
    for change in (
        {"differing": ["x"]},
        {"failures": ["x"]},
        {"rss": {"unbroken": 100.0, "broken": 200.0}},
        {"runs": 0},
    ):
        assert not soak.Soak(**{"runs": 1, "rss": fine.rss, **change}).summary()["ok"]  # type: ignore[arg-type]


def test_it_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    for minutes in ("0", "61", "nan"):
        assert soak.main(["--minutes", minutes]) == 2
        assert "--minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_two_kills_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--minutes", "3", "--kills", "2", "--seed", "1", "--jobs", "epochs", "--out", str(tmp_path)]
    assert soak.main(words) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ok"] and told["kills"] == 2 and told["runs"] == 1
    assert told["lines_compared"] >= 15 and told["differing"] == 0 and told["failures"] == []
