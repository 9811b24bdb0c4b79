"""Pre-training on CT volumes of many geometries, real or made: every objective goes down in thirty steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from tests.prepro.real_ct import lay_out_real_ct

STEPS = 30
OBJECTIVES = ("sen_mlm", "swin_unetr_mim", "local_itc")


@pytest.mark.slow
def test_every_objective_learns(tmp_path: Path, collection: Path, real_bert: Path, repository: Path) -> None:
    root = tmp_path / "ct_rate"
    arrows, size = tmp_path / "arrows", ("--image-size", "64", "32", "64")
    commands = [
        ["prepro/prepro_pretraining_data.py", "ct_rate", "--root", str(root), "--out", str(arrows), *size],
        [
            *("main.py", "with", "task_pretrain_mg3d", "tiny", "datasets=clm_ct_rate", f"data_root={arrows}"),
            *(f"tokenizer={real_bert}", f"log_dir={tmp_path / 'result'}", "num_gpus=0", "image_size=[64,32,64]"),
            *("max_text_len=250", f"max_steps={STEPS}", "batch_size=4", "per_gpu_batchsize=4", "fixed_draws=True"),
            *("learning_rate=5e-4", "warmup_steps=0"),
        ],
    ]
    lay_out_real_ct(collection, root)
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=repository, capture_output=True, encoding="utf-8", timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    log = next((tmp_path / "result").rglob("metrics.jsonl"))
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == STEPS
    for name in OBJECTIVES:
        losses = [row[f"{name}/train/loss"] for row in rows]
        print(name, "first five", round(fmean(losses[:5]), 4), "last five", round(fmean(losses[-5:]), 4))
        assert fmean(losses[-5:]) < fmean(losses[:5]), name
