"""Few open files and little shared memory: the run works, or says which limit is too low."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_job import make_job
from tiny_runs import lines, newest

WORDS = ["task_pretrain_mg3d", "tiny", "image_size=[64,32,32]", "max_steps=3", "num_gpus=0", "num_workers=2"]
SMALL_SHM = "mount -t tmpfs -o size=64m tmpfs /dev/shm"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_job(tmp_path_factory.mktemp("job"))


def limited(repository: Path, log_dir: Path, prefix: list[str], words: list[str]) -> subprocess.CompletedProcess[str]:
    """The entry, started by a shell that lowers a limit first."""
    command = [*prefix, sys.executable, "main.py", "with", *WORDS, f"log_dir={log_dir}", *words]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=repository, env=environ, capture_output=True, encoding="utf-8", timeout=300, check=False
    )


def under(limit: str) -> list[str]:
    return ["bash", "-c", f'{limit} && exec "$@"', "bash"]


@pytest.mark.slow
def test_256_open_files_are_enough_and_said(repository: Path, tmp_path: Path, job: list[str]) -> None:
    done = limited(repository, tmp_path, under("ulimit -n 256"), job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(lines(newest(tmp_path))) == [1, 2, 3]
    assert "only 256 open files are allowed" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "bash", "-c", SMALL_SHM], capture_output=True, check=False).returncode != 0,
    reason="mounting a small /dev/shm is not allowed here",
)
@pytest.mark.parametrize("batch", [2, 64])
def test_64_mib_of_shared_memory_work_or_are_named(
    repository: Path, tmp_path: Path, job: list[str], batch: int
) -> None:
    large = [f"per_gpu_batchsize={batch}", f"batch_size={batch}", "image_size=[128,96,128]"]
    fits = batch == 2
    done = limited(repository, tmp_path, ["unshare", "-m", *under(SMALL_SHM)], job if fits else [*job, *large])
    assert done.returncode == (0 if fits else 2), done.stderr[-3000:]
    if not fits:  # 2 workers x 2 batches x 64 volumes of 6 MiB
        assert "need about 1536 MiB of shared memory, 64 MiB are free" in done.stderr
        assert "num_workers=0" in done.stderr and "Traceback" not in done.stderr


def test_little_shared_memory_is_named_before_anything_is_read(
    tmp_path: Path, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mg3d.config_schema import resolve_config
    from mg3d.errors import EnvironmentProblem
    from mg3d.training import environment
    from mg3d.training.trainer import run

    monkeypatch.setattr(environment, "shared_memory_free_bytes", lambda: 64 << 20)
    cfg = {"num_workers": 4, "per_gpu_batchsize": 4, "batch_size": 4, "num_gpus": 0, "max_steps": 1}
    with pytest.raises(EnvironmentProblem, match=r"need about 192 MiB of shared memory, 64 MiB are free") as caught:
        run(resolve_config({**cfg, "log_dir": str(tmp_path / "out"), "data_root": str(tmp_path)}))
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()
    assert json.dumps(caught.value.remedy).count("num_workers") == 1
