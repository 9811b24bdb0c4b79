"""Means over an epoch that are exact across processes and survive a resume in the middle of the epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from mg3d.models.distributed import all_reduce_sum, rank


class EpochMeans:
    """Weighted sums by name, kept on the device without waiting for it.

    Every process must add the same names; which ones is fixed by the active objectives.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Count a value with a weight.

        Args:
            name: what is averaged.
            value: scalar mean of this batch on this process.
            weight: number of cases behind it.
        """
        heavy = torch.as_tensor(weight, dtype=torch.float32, device=value.device)
        entry = torch.stack([value.detach().float() * heavy, heavy])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def means(self) -> dict[str, float]:
        """Mean by name over all processes, 0 for a weight of 0; collective."""
        totals = ((name, all_reduce_sum(entry).tolist()) for name, entry in sorted(self._sums.items()))
        return {name: total / weight if weight else 0.0 for name, (total, weight) in totals}

    def reset(self) -> None:
        """Forget everything."""
        self._sums = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Sums over all processes; collective."""
        return {name: all_reduce_sum(entry).cpu() for name, entry in sorted(self._sums.items())}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from stored sums; they are put on the first process, the others start at zero."""
        share = 1.0 if rank() == 0 else 0.0
        self._sums = {name: entry.to(device) * share for name, entry in state.items()}
