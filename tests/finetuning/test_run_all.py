"""Many runs, one table: plan, resume, failures, SLURM array, paired intervals. The benchmarks are fast stand-ins."""

from __future__ import annotations

import csv
import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from mg3d.finetuning.comparison.measures import measure_rows
from mg3d.finetuning.comparison.plan import find_benchmarks, make_plan
from mg3d.finetuning.comparison.table import collect

FAKE = """
import csv, json, random, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
start = "scratch" if words.get("scratch") or not words.get("weights") else "pre"
folder = Path(words["log_dir"]) / f"{words['run_name']}-seed{words['seed']}-from_x"
number = len(list(folder.glob("version_*")))
place = folder / f"version_{number}"
(place / "checkpoints").mkdir(parents=True)
(place / "checkpoints" / "last.ckpt").write_bytes(b"")
(place / "words.json").write_text(json.dumps(sys.argv[1:]))
trouble = Path(words["log_dir"]) / f"break-{words['run_name']}"
if trouble.exists():
    trouble.unlink()
    (place / "status.json").write_text(json.dumps({"state": "failed"}))
    sys.exit("error: no space left")
rows, fold = [], int(words["fold"])
for k in range(30):
    draw = random.Random(k)
    score = draw.random() * 0.4 + 0.3 + (0.1 if start == "pre" else 0.0) + 0.02 * draw.random() * (start == "pre")
    if SEGMENTATION:
        rows += [{"id": f"c{fold}-{k}", "patient": f"p{k // 2}", "class": name, "dice": score} for name in "ab"]
    else:
        noise = 0.4 if start == "pre" else 4.0
        rows.append({"id": f"c{fold}-{k}", "patient": f"p{fold}-{k}", "target": k % 2,
                     "prob_x": min(max(0.5 + (k % 2 - 0.5) * 0.5 + noise * (draw.random() - 0.5), 0), 1)})
with open(place / "per_case.csv", "w", newline="") as stream:
    writer = csv.DictWriter(stream, list(rows[0])); writer.writeheader(); writer.writerows(rows)
name = "dice" if SEGMENTATION else "auroc"
(place / "metrics.json").write_text(json.dumps({"protocol": "clean", name: {"mean": 0.5}}))
(place / "status.json").write_text(json.dumps({"state": "finished"}))
"""


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """Two benchmarks that take no time."""
    for name, segmentation in (("outlines", True), ("balls", False)):
        folder = tmp_path / "downstream" / name
        folder.mkdir(parents=True)
        (folder / "main.py").write_text(f"SEGMENTATION = {segmentation}\n{FAKE}", encoding="utf-8")
    return tmp_path / "downstream"


@pytest.fixture(scope="module")
def run_all(repository: Path) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("run_all", repository / "downstream" / "run_all.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(benchmarks: Path, *more: str) -> list[str]:
    """A command line over two folds."""
    log_dir = benchmarks.parent / "runs"
    place = ["--benchmark-dir", str(benchmarks), "--log-dir", str(log_dir), "--rounds", "200"]
    return [*place, "--weights", "scratch", "pre.pt", "--folds", "0", "1", *more]


def table(benchmarks: Path) -> list[dict[str, Any]]:
    """Lines of the table."""
    with open(benchmarks.parent / "runs" / "comparison.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_everything_runs_once_and_is_compared_in_pairs(
    benchmarks: Path, run_all: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_all.main(words(benchmarks, "--set", "phantom", "max_epoch=1")) == 0
    lines = table(benchmarks)
    assert [(line["benchmark"], line["weights"]) for line in lines] == [
        ("balls", "scratch"), ("balls", "pre"), ("outlines", "scratch"), ("outlines", "pre"),
    ]  # fmt: skip
    pre = {line["benchmark"]: line for line in lines if line["weights"] == "pre"}
    assert pre["outlines"]["metric"] == "dice" and pre["balls"]["metric"] == "auroc"
    assert float(pre["outlines"]["difference"]) == pytest.approx(0.11, abs=0.01)
    for line in pre.values():
        low, high = float(line["difference_low"]), float(line["difference_high"])
        assert 0 < low <= float(line["difference"]) <= high and line["runs"] == line["planned"] == "2"
    narrow = float(pre["outlines"]["difference_high"]) - float(pre["outlines"]["difference_low"])
    assert narrow < 0.02 < float(pre["outlines"]["high"]) - float(pre["outlines"]["low"]), "pairs cancel the patients"
    shown = capsys.readouterr().out
    page = (benchmarks.parent / "runs" / "comparison.md").read_text(encoding="utf-8")
    assert shown == page and page.count("\n") == 6 and "| outlines | swin_b | pre | 2/2 | dice |" in page
    picture = matplotlib.image.imread(benchmarks.parent / "runs" / "comparison.png")
    assert picture.shape[0] > 200 and picture[..., :3].std() > 0.05
    folders = list((benchmarks.parent / "runs").glob("*/version_*"))
    assert run_all.main(words(benchmarks, "--set", "phantom", "max_epoch=1")) == 0
    assert sorted((benchmarks.parent / "runs").glob("*/version_*")) == sorted(folders) and len(folders) == 8
    started = (folders[0] / "words.json").read_text(encoding="utf-8")
    assert "phantom" in started and "max_epoch=1" in started


def test_a_failure_stops_nothing_and_goes_on_the_next_time(benchmarks: Path, run_all: ModuleType) -> None:
    runs = benchmarks.parent / "runs"
    runs.mkdir()
    (runs / "break-balls-swin_b-pre-fold1").touch()
    assert run_all.main(words(benchmarks)) == 1
    line = next(line for line in table(benchmarks) if (line["benchmark"], line["weights"]) == ("balls", "pre"))
    assert line["runs"] == "1" and line["difference"]
    assert run_all.main(words(benchmarks)) == 0
    again = runs / "balls-swin_b-pre-fold1-seed0-from_x" / "version_1" / "words.json"
    assert "resume=last" in again.read_text(encoding="utf-8")
    assert all(line["runs"] == "2" for line in table(benchmarks))


def test_other_settings_are_not_taken_for_the_same_run(
    benchmarks: Path, run_all: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--benchmarks", "balls"]
    runs = benchmarks.parent / "runs"
    runs.mkdir()
    for name in ("scratch-fold0", "scratch-fold1", "pre-fold0", "pre-fold1"):
        (runs / f"break-balls-swin_b-{name}").touch()
    assert run_all.main(words(benchmarks, *one)) == 1
    capsys.readouterr()
    assert run_all.main(words(benchmarks, *one, "--set", "max_epoch=7")) == 2
    told = capsys.readouterr().err
    assert "max_epoch=7" in told and "--log-dir" in told
    assert run_all.main(words(benchmarks, "--benchmarks", "ball")) == 2
    assert "allowed: balls, outlines" in capsys.readouterr().err


def test_the_array_script_runs_the_same_tasks(
    benchmarks: Path, run_all: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_all.main(words(benchmarks, "--array", "-", "--sbatch", "gres=gpu:1", "time=1:00:00")) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-7" in script and "#SBATCH --gres=gpu:1" in script and "--sbatch" not in script
    line = shlex.split(script.strip().splitlines()[-1])
    assert line[:2] == ["exec", sys.executable] and line[-2:] == ["--task", "$SLURM_ARRAY_TASK_ID"]
    called: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, command: called.append(command))
    run_all.main([*line[3:-1], "3"])
    assert "run_name=balls-swin_b-pre-fold1" in called[0] and "weights=pre.pt" in called[0]
    assert run_all.main([*line[3:-1], "8"]) == 2
    target = benchmarks.parent / "array.sh"
    assert run_all.main(words(benchmarks, "--array", str(target))) == 0
    assert target.read_text(encoding="utf-8").startswith("#!/bin/bash\n#SBATCH")


def test_scratch_takes_the_sizes_of_the_weights_of_its_encoder(benchmarks: Path) -> None:
    programs = find_benchmarks(benchmarks)
    plan = make_plan(
        programs,
        ["balls"],
        ["scratch", "swin_b=a/one.pt", "unet=two.pt", "three.pt"],
        encoders=["swin_b", "unet"],
        log_dir=benchmarks.parent / "runs",
    )
    assert [(task.encoder, task.label, task.weights) for task in plan] == [
        ("swin_b", "scratch", "a/one.pt"), ("swin_b", "one", "a/one.pt"), ("swin_b", "three", "three.pt"),
        ("unet", "scratch", "two.pt"), ("unet", "two", "two.pt"), ("unet", "three", "three.pt"),
    ]  # fmt: skip
    assert "scratch=True" in plan[0].arguments and "scratch=True" not in plan[1].arguments
    assert collect(plan)[0].runs == 0


def test_figures_of_rows() -> None:
    ones = np.ones((1, 4))
    binary = [{"id": str(k), "target": str(k % 2), "prob_x": str(0.2 + 0.1 * k)} for k in range(4)]
    auroc = measure_rows(binary, "auroc")
    assert auroc is not None and auroc(ones)[0] == 0.75
    classes = [{"id": str(k), "target": str(k % 2), "prob_a": str(1 - k % 2), "prob_b": str(k % 2)} for k in range(4)]
    accuracy = measure_rows(classes, "accuracy")
    assert accuracy is not None and accuracy(ones)[0] == 1.0
    outlines = [{"id": "a", "class": c, "dice": d} for c, d in (("x", "0.5"), ("x", "0.7"), ("y", ""), ("y", "1.0"))]
    dice = measure_rows(outlines, "dice")
    assert dice is not None and dice(ones)[0] == pytest.approx(0.8)
    assert measure_rows([{"id": "a", "hypothesis": "b"}], "bleu_4") is None
    assert measure_rows(binary, "unheard") is None
