"""Fit an array to a size: cut a block anywhere, filling what lies outside, and resize along each axis. No torch.

Axis legend: D depth, H rows, W columns; the functions do not care which is which.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["centred_start", "clamped_start", "cut_block", "linear_taps", "resize_linear", "window_to_unit"]


def centred_start(length: int, size: int) -> int:
    """First index of a centred block; negative where the block is longer than the axis."""
    return (length - size) // 2


def clamped_start(centre: int, length: int, size: int) -> int:
    """First index of a block round ``centre`` that stays inside the axis; centred where the axis is too short."""
    if length < size:
        return centred_start(length, size)
    return max(0, min(centre - size // 2, length - size))


def cut_block(array: np.ndarray, starts: Sequence[int], sizes: Sequence[int], fill: float) -> np.ndarray:
    """Cut a block; it may reach beyond the array on any side.

    Args:
        array: any number of axes.
        starts: first index of the block per axis, may be negative.
        sizes: length of the block per axis.
        fill: value of the part that lies outside.

    Returns:
        A copy of shape ``sizes``, of the array's type.
    """
    block = np.full(tuple(sizes), fill, dtype=array.dtype)
    source, target = [], []
    for start, size, length in zip(starts, sizes, array.shape, strict=True):
        first, last = max(start, 0), min(start + size, length)
        source.append(slice(first, max(last, first)))
        target.append(slice(first - start, max(last, first) - start))
    block[tuple(target)] = array[tuple(source)]
    return block


def resize_linear(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear resize along each axis (half-pixel centres, no anti-aliasing), as torch's trilinear interpolation.

    Args:
        volume: array of any real type.
        size: wanted length per axis.

    Returns:
        float32 array of shape ``size``.
    """
    out = np.asarray(volume, dtype=np.float32)
    # the axis that shrinks most goes first: fewer numbers for the others
    for axis in sorted(range(out.ndim), key=lambda a: size[a] / out.shape[a]):
        if out.shape[axis] != size[axis]:
            lower, upper, share = linear_taps(out.shape[axis], size[axis])
            near, far = np.take(out, lower, axis), np.take(out, upper, axis)
            out = near + share.reshape([-1 if a == axis else 1 for a in range(out.ndim)]) * (far - near)
    return np.ascontiguousarray(out)


def linear_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two neighbours of every output of a linear resize with half-pixel centres.

    Args:
        length: input length.
        size: output length.

    Returns:
        lower and upper input index, and the float32 weight of the upper one, each [size].
    """
    steps = np.arange(size, dtype=np.float32)
    position = np.maximum((steps + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5), 0)
    lower = np.minimum(position.astype(np.int64), length - 1)
    return lower, np.minimum(lower + 1, length - 1), (position - lower).astype(np.float32)


def window_to_unit(hu: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """Map a window to [0, 1], clipped; float32."""
    low, high = window_hu
    return (np.clip(hu, low, high).astype(np.float32) - np.float32(low)) / np.float32(high - low)
