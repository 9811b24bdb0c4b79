"""The generation benchmark runs, writes the same reports both ways, and ends with its JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_ends_with_its_figures(repository: Path) -> None:
    small = ["--reports", "2", "--words", "6", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/generate.py", *small],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same_output"] is True
    assert found["largest_score_difference"] < 1e-3
    assert found["speedup"] > 0 and found["reports"] == 2
