"""Start a benchmark's ``main.py`` as a user does, from another folder, with one thread."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from folders import DOWNSTREAM

TIMEOUT_S = 540


@dataclass(frozen=True)
class Finished:
    """What a command left.

    Attributes:
        code: exit code.
        out: standard output.
        told: standard error.
    """

    code: int
    out: str
    told: str

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        return dict(json.loads(self.out.splitlines()[-1]))


def start(folder: str, cwd: Path, *words: object) -> Finished:
    """Run ``python downstream/<folder>/main.py WORDS`` in ``cwd``."""
    command = [sys.executable, str(DOWNSTREAM / folder / "main.py"), *map(str, words)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **threads},
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_phantom(folder: str, cwd: Path, *words: object) -> Finished:
    """The phantom run of a segmentation folder, in fewer steps, on one thread."""
    few = ("max_epoch=2", "val_every_epochs=2", "crops_per_volume=1", "overlap=0.0", "bootstrap_rounds=50")
    places = [
        f"{key}={cwd / place}" for key, place in (("data_root", "in"), ("work_dir", "work"), ("log_dir", "result"))
    ]
    done = start(folder, cwd, "with", "phantom", *few, *places, "num_gpus=0", "num_threads=1", *words)
    assert done.code == 0, done.told[-3000:]
    return done


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    """The lines of ``per_case.csv``."""
    with (run_dir / "per_case.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics_of(run_dir: Path) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    return dict(json.loads((run_dir / "metrics.json").read_text(encoding="utf-8")))


def assert_complete(run_dir: Path, images: dict[str, Path], labels: int) -> None:
    """The files of every run are there, with one prediction in place for every reported image."""
    for name in ("config.json", "environment.json", "splits.json", "metrics.json", "metrics.jsonl", "report.html"):
        assert (run_dir / name).stat().st_size > 0, name
    for name in ("best", "last"):
        assert (run_dir / "checkpoints" / f"{name}.ckpt").is_file()
    assert json.loads((run_dir / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
    test = json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))["test"]
    assert sorted(path.name for path in (run_dir / "predictions").iterdir()) == sorted(
        f"{name}.nii.gz" for name in test
    )
    for name in test:
        found, source = nib.load(run_dir / "predictions" / f"{name}.nii.gz"), nib.load(images[name])
        assert found.shape == source.shape and np.array_equal(found.affine, source.affine)
        assert np.asarray(found.dataobj).max() <= labels
