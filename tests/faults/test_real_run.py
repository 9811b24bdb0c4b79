"""The real entry, model and data: killed at three steps, it ends with the losses of the unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import make_job
from tiny_runs import compared, lines, newest

STEPS = 12
WORDS = ["task_pretrain_mg3d", "tiny", "image_size=[64,32,32]", f"max_steps={STEPS}", "loss_names.itc=1"]
WORDS += ["checkpoint_every_n_steps=3", "num_gpus=0", "memory_queue=xbm", "memory_queue_size=4", "learning_rate=1e-3"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that name data of ten batches an epoch and the text encoder."""
    return make_job(tmp_path_factory.mktemp("job"), rows=10)


def start(repository: Path, log_dir: Path, words: list[str]) -> subprocess.Popen[bytes]:
    log_dir.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log_dir / "output.txt", "wb") as output:
        command = [sys.executable, "main.py", "with", *WORDS, *words, f"log_dir={log_dir}"]
        return subprocess.Popen(command, cwd=repository, env=environ, stdout=output, stderr=output)


def train(repository: Path, log_dir: Path, words: list[str]) -> dict[int, dict[str, Any]]:
    code = start(repository, log_dir, words).wait(500)
    assert code == 0, (log_dir / "output.txt").read_text(encoding="utf-8")[-3000:]
    return lines(newest(log_dir))


def kill_after(repository: Path, log_dir: Path, step: int, words: list[str]) -> None:
    known = set(log_dir.glob("*/version_*"))
    process = start(repository, log_dir, words)
    while process.poll() is None:
        if set(log_dir.glob("*/version_*")) - known and step in lines(newest(log_dir)):
            break
        time.sleep(0.01)
    assert process.poll() is None, (log_dir / "output.txt").read_text(encoding="utf-8")[-3000:]
    process.send_signal(signal.SIGKILL)
    process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_three_times(repository: Path, tmp_path: Path, job: list[str], workers: int) -> None:
    words = [*job, f"num_workers={workers}"]
    unbroken = train(repository, tmp_path / "unbroken", words)
    assert sorted(unbroken) == list(range(1, STEPS + 1))
    log_dir = tmp_path / "broken"
    kill_after(repository, log_dir, 4, words)
    for step in (7, 10):  # the epoch ends at step 10
        kill_after(repository, log_dir, step, [*words, "resume_from=last"])
    train(repository, log_dir, [*words, "resume_from=last"])
    seen = 0
    for run_dir in sorted(log_dir.glob("*/version_*")):
        for step, line in lines(run_dir).items():
            assert compared(line) == compared(unbroken[step]), (run_dir.name, step)
            seen += 1
    assert seen >= STEPS and max(lines(newest(log_dir))) == STEPS
    weights = [
        torch.load(newest(folder) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path / "unbroken", log_dir)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_stopped_by_a_signal_and_refused_input(repository: Path, tmp_path: Path, job: list[str]) -> None:
    process = start(repository, tmp_path, job)
    while process.poll() is None and not any(lines(folder) for folder in tmp_path.glob("*/version_*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert (newest(tmp_path) / "checkpoints/last.ckpt").exists()
    arrow = Path(next(word for word in job if word.startswith("data_root=")).partition("=")[2])
    other = tmp_path / "arrows"
    other.mkdir()
    for path in arrow.glob("*.arrow"):
        (other / path.name).write_bytes(path.read_bytes()[: 3000 if "ct_rate_train" in path.name else None])
    refused = start(
        repository, tmp_path / "refused", [word for word in job if "data_root" not in word] + [f"data_root={other}"]
    )
    assert refused.wait(120) == 2
    told = (tmp_path / "refused/output.txt").read_text(encoding="utf-8")
    assert "Traceback" not in told and "clm_ct_rate_train.arrow" in told
    assert json.loads((newest(tmp_path / "refused") / "status.json").read_text(encoding="utf-8"))["state"] == "failed"
