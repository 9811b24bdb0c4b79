"""The demo learns: retrieval, zero-shot and probe above their floors on patients it never saw, chance when shuffled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mg3d.datasets.labels import CT_RATE_LABELS

DIRECTIONS = ("report_to_volume", "volume_to_report")
MIN_STUDIES = 200


def run(repository: Path, *words: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=repository, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict:
    """Metrics of one run of what `run_scripts/pretrain.sh` does without an argument, in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    studies, arrows = folder / "phantom", folder / "arrows"
    packing = ("prepro/prepro_pretraining_data.py",)
    size = ("--out", str(arrows), "--image-size", "32", "32", "64")
    ctrg = studies / "ctrg"
    run(repository, "-m", "mg3d.phantoms", "--out", str(studies))
    run(repository, *packing, "ct_rate", "--root", str(studies / "ct_rate"), *size, "--target-spacing", "none")
    run(repository, *packing, "ctrg", "--root", str(ctrg), "--annotation", str(ctrg / "annotation.json"), *size)
    places = (f"data_root={arrows}", f"tokenizer={studies / 'text_encoder'}", f"log_dir={folder / 'result'}")
    processes = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = ("task_pretrain_mg3d", "demo", "per_gpu_batchsize=8", "num_gpus=0", *places)
    printed = run(repository, *processes, "main.py", "with", *words)
    line = json.loads(printed.splitlines()[-1])
    metrics = json.loads((Path(line["run_dir"]) / "metrics.json").read_text(encoding="utf-8"))
    assert line["zero_shot_auroc"] == metrics["zero_shot_auroc"]["mean"]
    return metrics


@pytest.mark.slow
def test_the_demo_is_above_its_floors(demo: dict) -> None:
    assert demo["zero_shot_auroc"]["n"] >= MIN_STUDIES
    for direction in DIRECTIONS:
        assert demo[f"{direction}_recall_at_1"]["times_chance"] >= 3.0
        assert demo[f"{direction}_recall_at_10"]["times_chance"] >= 2.5
    assert demo["zero_shot_auroc"]["mean"] >= 0.60
    assert demo["linear_probe_gain"]["mean"] >= 0.02
    assert set(demo["zero_shot_auroc"]["per_class"]) < set(CT_RATE_LABELS)


@pytest.mark.slow
def test_shuffled_volumes_give_chance(demo: dict) -> None:
    assert set(demo["permuted_images"]) >= {f"{direction}_recall_at_1" for direction in DIRECTIONS}
    for name, control in demo["permuted_images"].items():
        low, high = control["ci95"]
        assert low <= control["chance"] <= high, name
