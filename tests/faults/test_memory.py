"""Ten thousand studies, four epochs, two workers: main process and workers need no more in the end than at first.

Lightning keeps the workers of a validation until the next one, so that from the second epoch on there are two more.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_job import VOCAB, make_job
from tiny_runs import CONTEXT, newest
from torch import Tensor, nn

ROWS, EPOCHS, WORKERS = 10_000, 4, 2


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_tree() -> list[int]:
    """Resident bytes of this process and of each of its children."""
    own = os.getpid()
    children = [int(child) for child in Path(f"/proc/{own}/task/{own}/children").read_text(encoding="utf-8").split()]
    return [resident(own), *sorted(resident(child) for child in children)]


class Watched(pl.LightningModule):
    """Trains one number; notes the memory of all processes at the last batch of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.held: list[list[int]] = []
        self.hoard: list[Any] | None = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if batch_idx == self.trainer.num_training_batches - 3:
            self.held.append(resident_tree())
        if self.hoard is not None:
            self.hoard.append(batch["image"])
        return (self.weight * batch["image"].mean() - batch["text_ids"].float().mean()).square()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/the_metric", self.weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def train(folder: Path, rows: int, leak: bool) -> None:
    """A run of the real trainer, loader and packed rows around the watched module."""
    from mg3d.config_schema import resolve_config
    from mg3d.training.trainer import Task, run

    multiprocessing.set_start_method("fork", force=True)  # loader workers as in a run from the shell
    keys: dict[str, Any] = dict(word.partition("=")[::2] for word in make_job(folder, rows=rows))
    keys |= {
        "text_encoder_random_init": True, "vocab_size": len(VOCAB), "image_size": [32, 32, 64], "max_text_len": 40,
        "datasets": ["clm_ct_rate"], "num_workers": WORKERS, "per_gpu_batchsize": 20, "batch_size": 20, "num_gpus": 0,
        "precision": 32, "max_epoch": EPOCHS, "log_dir": str(folder / "result"), "num_threads": 1,
    }  # fmt: skip
    watched = Watched()
    watched.hoard = [] if leak else None
    run(resolve_config(keys), Task(module=lambda cfg, steps: watched))
    torch.save(watched.held, newest(folder / "result") / "held.pt")


def growth(folder: Path, rows: int, leak: bool = False) -> float:
    """Largest growth of all processes together after the second epoch, as a part of what they held then."""
    folder.mkdir()
    process = CONTEXT.Process(target=train, args=(folder, rows, leak))
    process.start()
    process.join(900)
    assert process.exitcode == 0
    held = torch.load(newest(folder / "result") / "held.pt", weights_only=True)
    assert len(held) == EPOCHS and all(1 + WORKERS <= len(each) <= 1 + 2 * WORKERS for each in held), held
    assert len({len(each) for each in held[1:]}) == 1, held
    return max(sum(each) for each in held[2:]) / sum(held[1]) - 1.0


@pytest.mark.slow
def test_memory_does_not_grow_after_the_first_epoch(tmp_path: Path) -> None:
    assert growth(tmp_path / "long", ROWS) < 0.05


@pytest.mark.slow
def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    """The control: keeping every volume of 600 studies an epoch, 150 MB, is far above the bar."""
    assert growth(tmp_path / "leak", 600, leak=True) > 0.05
