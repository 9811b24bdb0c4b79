"""The sliding-window benchmark at a tiny size: both networks do the same work and agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, sliding_window
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


def test_ratios_are_those_of_the_fastest_rounds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seconds = {"ours": iter((9.0, 4.0, 5.0)), "monai": iter((8.0, 6.0, 7.0))}

    def fresh(module: str, options: dict[str, Any]) -> dict[str, float]:
        assert module == "sliding_window_subject" and options["size"] == "64,64,64"
        if options["network"] == "difference":
            return {"max_abs_diff": 1e-6}
        peak = 1.0 if options["network"] == "ours" else 2.0
        return {"seconds": next(seconds[options["network"]]), "windows": 3, "peak_gib": peak}

    for place in (harness, sliding_window):  # the turns, and the difference after them
        monkeypatch.setattr(place, "run_fresh", fresh)
    assert sliding_window.main(["--small", "--threads", "1"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (figures["speed_ratio"], figures["memory_ratio"], figures["windows"]) == (1.5, 0.5, 3)


@pytest.mark.slow
def test_a_subject_prints_one_json_object(repository: Path) -> None:
    size = ("--size", "64,32,40", "--roi", "64,32,32", "--feature-size", "12", "--threads", "1")
    command = [sys.executable, "-m", "benchmarks.sliding_window_subject", "--network", "ours", *size]
    done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=True, timeout=600)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["windows"] == 2 and figures["seconds"] > 0 and figures["peak_gib"] > 0
