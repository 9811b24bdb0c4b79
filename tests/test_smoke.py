"""A look at the whole in little time (with the tests elsewhere marked ``smoke``): training goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_job import make_job

from mg3d.config import ex
from mg3d.config_cli import compose_config

WORDS = [
    "task_pretrain_mg3d",
    "tiny",
    "image_size=[64,32,32]",
    "checkpoint_every_n_steps=1",
    "num_gpus=0",
    "num_workers=0",
]


@pytest.mark.smoke
def test_one_step_of_pre_training_and_its_resume_are_two_steps(tmp_path: Path) -> None:
    from mg3d.training import trainer

    job = make_job(tmp_path / "job", rows=4)

    def losses(folder: str, *words: str) -> list[float]:
        result = trainer.run(compose_config(ex, [*WORDS, *job, f"log_dir={tmp_path / folder}", *words]))
        rows = [
            json.loads(line)
            for line in (Path(result["run_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return [row["loss"] for row in rows if "loss" in row]

    whole = losses("whole", "max_steps=2")
    first = losses("broken", "max_steps=1")
    second = losses("broken", "max_steps=2", "resume_from=last")
    assert len(whole) == 2 and [*first, *second[-1:]] == whole
