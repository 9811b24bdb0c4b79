"""tools/compare_runs.py: segmentations, classes and binary outputs of two runs, and what cannot be compared."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.command import answer, modules_after, refusal
from tools.compare_runs import main


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    with (folder / "per_case.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def segmentation(gain: float, cases: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.3, 0.6, cases)
    noise = np.random.default_rng(int(1000 * gain)).normal(0, 0.01, cases)
    return [
        {"id": f"c{k}", "patient": f"p{k // 2}", "class": name, "dice": hard[k] + gain + noise[k], "hd95": 9 - 9 * gain}
        for k in range(cases)
        for name in ("RV", "LV")
    ]


def classification(noise: float, names: tuple[str, ...]) -> list[dict[str, Any]]:
    targets = np.random.default_rng(1).integers(0, max(len(names), 2), 90)
    logits = np.random.default_rng(int(noise * 10)).normal(0, noise, (90, len(names)))
    if len(names) == 1:
        probs = 1 / (1 + np.exp(-(logits + 3 * (targets[:, None] - 0.5))))
    else:
        probs = np.exp(logits + 3 * np.eye(len(names))[targets])
        probs = probs / probs.sum(1, keepdims=True)
    return [
        {"id": f"s{k}", "patient": f"p{k}", "target": targets[k]}
        | {f"prob_{name}": probs[k, j] for j, name in enumerate(names)}
        for k in range(90)
    ]


def test_a_better_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write(tmp_path / "a", segmentation(0.0)), write(tmp_path / "b", segmentation(0.1)[:-2])
    told = answer(capsys, main, *runs, "--rounds", "300")
    assert {name for name in told if "/" in name} == {"dice/RV", "dice/LV", "hd95/RV", "hd95/LV"}
    dice = told["dice/RV"]
    assert dice["difference"] == pytest.approx(0.1, abs=0.01) and dice["ci95"][0] > 0.08
    assert (dice["n"], dice["patients"], dice["left_out"]) == (11, 6, 1)
    assert dice["p_bootstrap"] < 0.01 and dice["p_wilcoxon"] == pytest.approx(0.03125)
    assert told["hd95/LV"]["difference"] == pytest.approx(-0.9)
    assert "p (rank)" in told["printed"] and "+0.1" in told["printed"]
    one = answer(capsys, main, *runs, "--rounds", "50", "--metric", "hd95", "--json")
    assert set(one) == {"hd95/RV", "hd95/LV", "printed", "told"} and not one["printed"]


@pytest.mark.parametrize("names", [("sick",), ("Normal", "CP", "NCP")])
def test_a_better_classifier(names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write(tmp_path / "a", classification(6.0, names)), write(tmp_path / "b", classification(0.5, names))
    told = answer(capsys, main, *runs, "--rounds", "200")
    key = "auroc/sick" if len(names) == 1 else "macro_auroc"
    assert told[key]["ci95"][0] > 0 and told[key]["mean_b"] > 0.95 > told[key]["mean_a"]
    assert told[key]["p_wilcoxon"] is None and told[key]["n"] == 90


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a", segmentation(0.0))
    assert "no such file" in refusal(capsys, main, run, tmp_path)
    assert "iou" in refusal(capsys, main, run, run, "--metric", "iou")
    others = [{**row, "id": f"x{row['id']}"} for row in segmentation(0.0)]
    assert "share no case" in refusal(capsys, main, run, write(tmp_path / "other", others))
    classes = classification(1.0, ("a", "b"))
    wrong = [{**row, "target": 1 - row["target"]} for row in classes]
    first, second = write(tmp_path / "c", classes), write(tmp_path / "d", wrong)
    assert "other targets" in refusal(capsys, main, first, second)
    assert "prob_" in refusal(capsys, main, first, run)
    (tmp_path / "noise.csv").write_bytes(bytes(range(256)))
    assert "noise.csv: is no text" in refusal(capsys, main, run, tmp_path / "noise.csv")
    assert "--rounds" in refusal(capsys, main, run, run, "--rounds", "0")


def test_no_torch_is_needed(repository: Path, tmp_path: Path) -> None:
    run = write(tmp_path / "a", segmentation(0.0))
    assert modules_after(repository, "tools.compare_runs", "--help") == (0, set())
    assert modules_after(repository, "tools.compare_runs", run, run, "--rounds", "20") == (0, set())
