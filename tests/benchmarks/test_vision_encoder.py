from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_encoder_benchmark_prints_its_figures(repository: Path) -> None:
    command = [sys.executable, "benchmarks/vision_encoder.py", "--threads", "1", "--size", "32", "32", "32"]
    done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    for prefix in ("", "bf16_"):
        assert {f"{prefix}{key}" for key in ("speedup_fwd_bwd", "speedup_fwd", "memory_ratio")} <= set(figures)
    assert figures["max_abs_diff"] <= 1e-4 < figures["bf16_max_abs_diff"]
