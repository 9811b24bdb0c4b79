"""The launch script for real: two processes on the CPU train exactly as one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_job import make_job


def _train(repository: Path, script: str, words: list[str], log_dir: Path) -> list[dict[str, float]]:
    """Run a script in this virtual environment and return its lines, one a step."""
    environ = os.environ | {"VIRTUAL_ENV": sys.prefix, "NPROC": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    for name in [key for key in environ if key.startswith("SLURM_")]:
        del environ[name]
    done = subprocess.run(
        ["bash", str(repository / "run_scripts" / script), *words, f"log_dir={log_dir}", "num_gpus=0"],
        env=environ, capture_output=True, encoding="utf-8", timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = log_dir.glob("*/version_0/metrics.jsonl")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(repository: Path, tmp_path: Path) -> None:
    words = ["tiny", *make_job(tmp_path), "loss_names.itc=1", "max_steps=3", "batch_size=4"]
    two = _train(repository, "pretrain_multi_gpus.sh", [*words, "per_gpu_batchsize=2"], tmp_path / "two")
    one = _train(repository, "pretrain.sh", [*words, "per_gpu_batchsize=4"], tmp_path / "one")
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        for key in (name for name in ours if name.endswith("loss") or name == "grad_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5), (ours["step"], key)
