"""The benchmark of pairwise retrieval at a small size: both ways agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_batched_scores_agree_with_the_double_loop(repository: Path) -> None:
    words = ["--reports", "70", "--volumes", "66", "--width", "16", "--tokens", "3", "--sample", "6", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/retrieval.py", *words],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["largest_score_difference"] <= 1e-5
    assert found["naive_pairs_run"] == 36 and found["speedup"] > 1
