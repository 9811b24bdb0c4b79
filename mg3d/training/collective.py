"""Two small collectives of the training loop; without a process group they return their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed


def is_distributed() -> bool:
    """Whether this process belongs to a process group of more than one."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise maximum over the ranks of a few numbers, the same on all ranks."""
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return tensor.tolist()


def mean(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise mean over the ranks of a few numbers, the same on all ranks."""
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    return (tensor / distributed.get_world_size()).tolist()


def from_rank_zero(value: str) -> str:
    """The text that rank 0 holds, on every rank."""
    if not is_distributed():
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]
