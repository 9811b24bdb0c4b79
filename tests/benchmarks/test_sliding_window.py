"""The sliding-window benchmark at a tiny size: both networks do the same work and agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.sliding_window_subject import chest, difference, measure
from mg3d.models.finetune.window_inference import WindowOptions


def test_both_networks_see_the_same_windows_and_agree() -> None:
    volume, windows = chest((64, 32, 48)), WindowOptions((64, 32, 32), overlap=0.25, batch_size=1)
    assert volume.shape == (1, 1, 64, 32, 48) and float(volume.min()) == 0 < float(volume.max()) <= 1
    found = {name: measure(name, volume, windows, feature_size=12) for name in ("ours", "monai")}
    assert found["ours"]["windows"] == found["monai"]["windows"] == 2
    assert all(each["seconds"] > 0 for each in found.values())
    assert 0 <= difference(volume, windows, feature_size=12)["max_abs_diff"] < 1e-3
    assert torch.equal(volume, chest((64, 32, 48)))


@pytest.mark.slow
def test_command_prints_both_ratios(repository: Path) -> None:
    size = ("--size", "64", "32", "40", "--roi", "64", "32", "32", "--feature-size", "12", "--threads", "1")
    command = [sys.executable, "benchmarks/sliding_window.py", *size]
    done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=True, timeout=600)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"speed_ratio", "memory_ratio", "seconds", "monai_seconds", "peak_gib"} <= set(figures)
    assert figures["windows"] == 2 and figures["max_abs_diff"] < 1e-3
