"""The benchmark of pairwise retrieval at a small size: both ways agree, and what is extrapolated is said."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def figures(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the benchmark with some words and return its last line."""

    def run(*more: str) -> dict[str, Any]:
        path = repository / "benchmarks" / "retrieval.py"
        monkeypatch.setattr(sys, "argv", [str(path), "--width", "16", "--tokens", "3", "--rounds", "1", *more])
        runpy.run_path(str(path), run_name="__main__")
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    return run


def test_batched_scores_agree_with_the_double_loop(figures: Any) -> None:
    found = figures("--reports", "70", "--volumes", "66", "--sample", "6")
    assert found["largest_score_difference"] <= 1e-5
    assert found["naive_pairs_run"] == 36 and found["naive_extrapolated"] and found["speedup"] > 1
    assert found["naive_s"] == pytest.approx(found["naive_run_s"] / 36 * 70 * 66, rel=0.2)


def test_every_pair_leaves_nothing_to_extrapolate(figures: Any) -> None:
    found = figures("--reports", "12", "--volumes", "9", "--every-pair")
    assert found["naive_pairs_run"] == 108 and not found["naive_extrapolated"]
    assert found["speedup"] == found["speedup_same_pairs"] and found["largest_score_difference"] <= 1e-5
