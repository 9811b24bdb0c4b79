"""Which positions of a volume attend to each other: the windows of Swin attention without their padding.

MONAI pads the grid to whole windows, rolls it for shifted blocks and masks what the roll brought together. Seen from
the positions that exist, an axis is simply cut into segments: whole windows, and shorter ones at its ends. Here only
those segments are computed. Padding is not masked in the published attention; all padded positions of a window have
the same key and value (the bias of the projection), so they act together as one further key. Pairs that the mask puts
at -100 have weight exp(-100), nothing in single precision, and are left out.

Axis legend: D, H, W grid axes; A heads; P positions of a segment, K = P or P + 1 keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Equal segments of one axis that follow each other.

    Attributes:
        start: first grid position.
        length: positions of one segment.
        count: number of segments.
        offset: place of a segment's first position inside its window.
        padded: padded positions behind a segment that take part in its attention.
    """

    start: int
    length: int
    count: int
    offset: int = 0
    padded: int = 0


@dataclass(frozen=True)
class WindowGroup:
    """All windows with one run per axis: one batch of equal attention problems.

    Attributes:
        runs: the run along D, H and W.
        positions: index of the real positions in a full window (flattened, W fastest).
        padding: index of the padded positions that they see.
    """

    runs: tuple[Run, Run, Run]
    positions: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Positions of all windows of the group in one sample."""
        return prod(run.length * run.count for run in self.runs)

    def windows(self, grid_BDHW: Tensor) -> Tensor:
        """View ``[B, D, H, W]`` as ``[B, nD, nH, nW, P_D, P_H, P_W]``; nothing is copied."""
        for axis, run in zip((1, 3, 5), self.runs, strict=True):
            part = grid_BDHW.narrow(axis, run.start, run.length * run.count)
            grid_BDHW = part.unflatten(axis, (run.count, run.length))
        # [B, nD, P_D, nH, P_H, nW, P_W]
        return grid_BDHW.movedim((3, 5), (2, 3))


def axis_runs(size: int, edge: int, shift: int) -> tuple[Run, ...]:
    """Cut one axis into the segments that windows of ``edge`` positions, moved by ``shift``, make of it.

    Args:
        size: grid positions.
        edge: positions of a window, at most ``size``.
        shift: cyclic shift of the published attention; 0 for plain blocks.

    Returns:
        runs that cover every position once.
    """
    runs = [Run(0, shift, 1, offset=edge - shift)] if shift else []
    whole, rest = divmod(size - shift, edge)
    if whole:
        runs.append(Run(shift, edge, whole))
    if rest:
        # the last rolled window holds the end of the axis and, behind a mask, its beginning
        last = shift and whole == -(-size // edge) - 1
        visible = edge - shift if last else edge
        runs.append(Run(size - rest, rest, 1, padded=visible - rest))
    return tuple(runs)


@lru_cache(maxsize=64)
def window_groups(
    grid: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int]
) -> tuple[WindowGroup, ...]:
    """All window groups of a grid; together they hold every position once.

    Args:
        grid: positions along D, H, W.
        window: window edge per axis, not larger than the grid.
        shift: cyclic shift per axis.
    """
    runs = [axis_runs(*sizes) for sizes in zip(grid, window, shift, strict=True)]
    return tuple(_group((d, h, w), window) for d, h, w in product(*runs))


@lru_cache(maxsize=64)
def window_order(
    grid: tuple[int, int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The order of grid positions in which those of one window, and the windows of one group, follow each other.

    Args:
        grid: samples and positions along D, H, W.
        window: window edge per axis, not larger than the grid.
        shift: cyclic shift per axis.
        device: of the result.

    Returns:
        index of the position (flattened, W fastest) at each place of the order, and its inverse, both ``[B*D*H*W]``.
    """
    with torch.inference_mode(False):  # kept for later calls, of training too
        index_BDHW = torch.arange(prod(grid)).view(grid)
        groups = window_groups(grid[1:], window, shift)
        order = torch.cat([group.windows(index_BDHW).flatten() for group in groups])
        back = torch.empty_like(order).scatter_(0, order, index_BDHW.flatten())
        return order.to(device), back.to(device)


def _group(runs: tuple[Run, Run, Run], window: Sequence[int]) -> WindowGroup:
    real = _flat([range(run.offset, run.offset + run.length) for run in runs], window)
    seen = _flat([range(run.offset, run.offset + run.length + run.padded) for run in runs], window)
    held = set(real)
    return WindowGroup(runs, real, tuple(index for index in seen if index not in held))


def _flat(ranges: Sequence[range], window: Sequence[int]) -> tuple[int, ...]:
    return tuple((d * window[1] + h) * window[2] + w for d, h, w in product(*ranges))
