"""Where a training of the report labeller stands, on disk after every epoch, so that a killed one goes on.

Interrupted and resumed it gives the same weights as in one piece (on a CPU, bit for bit): optimizer, schedule, random
numbers and the best loss so far are stored, and an epoch that was cut short is done again.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mg3d.atomic import write_text_atomically
from mg3d.training.checkpoint_io import load_file, remove_leftovers, save_file

__all__ = ["HISTORY", "STATE", "Progress", "note", "restore", "store"]

STATE, HISTORY = "state.ckpt", "metrics.jsonl"


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        epoch: the next one.
        lowest: best validation loss.
        stale: epochs since then.
        seconds: spent so far.
        history: rows of the epochs that are done.
        probe: rows of the epochs of the linear layer alone.
    """

    epoch: int = 0
    lowest: float = math.inf
    stale: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    probe: list[dict[str, Any]] = field(default_factory=list)


def store(folder: Path, progress: Progress, network: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
    """Write ``state.ckpt``; a kill at any instant leaves the old one or the new one."""
    content = {
        "progress": asdict(progress),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {} if scheduler is None else scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    save_file(content, folder / STATE, note=f"epoch {progress.epoch}")


def restore(folder: Path, network: nn.Module, optimizer: Optimizer, scheduler: Any) -> Progress | None:
    """Take a training up again, and cut lines of unfinished epochs from ``metrics.jsonl``.

    Args:
        folder: the run.
        network: receives the weights, like the others.
        optimizer: of the whole network.
        scheduler: of its rate; None without one.

    Returns:
        where to go on; None when no state was stored yet.

    Raises:
        CheckpointError: the state is damaged.
    """
    remove_leftovers(folder)
    if not (folder / STATE).exists():
        (folder / HISTORY).unlink(missing_ok=True)
        return None
    content = load_file(folder / STATE)
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(content["scheduler"])
    torch.set_rng_state(content["random"])
    if content["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(content["random_cuda"])
    progress = Progress(**content["progress"])
    lines = [json.dumps(row) + "\n" for row in (*progress.probe, *progress.history)]
    write_text_atomically(folder / HISTORY, "".join(lines))
    return progress


def note(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to ``metrics.jsonl``."""
    with (folder / HISTORY).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
