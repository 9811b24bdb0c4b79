"""Volumes: the pre-training geometry, intensity mapping, and the published resampling steps as pure functions.

Axis legend: D depth (axial slices, z), H rows (y, towards posterior), W columns (x, towards the patient's left).
The geometry is written here once and imported everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

CROP_FRACTIONS_DHW: Final = (0.88, 0.65625, 0.875)
PRETRAIN_SIZE_DHW: Final = (128, 96, 128)
TARGET_SPACING_MM: Final = (1.5, 0.75, 0.75)
WINDOW_HU: Final = (-1000, 1000)
CTRG_CROP_HW: Final = (336, 448)
CTRG_DEPTH_RANGE: Final = (0.06, 0.94)


@dataclass(frozen=True, repr=False)
class Volume:
    """A scan on a regular grid.

    Args:
        array: voxels ``[D, H, W]`` in canonical order (z to superior, y to posterior, x to the patient's left).
        spacing_mm: distance of neighbouring voxels along (z, y, x).
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.array.ndim != 3:
            raise ValueError(f"a volume has three axes (D, H, W), got shape {self.array.shape}")
        if len(self.spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise ValueError(f"spacing_mm must be three positive numbers (z, y, x), got {self.spacing_mm}")

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Length of the grid along (z, y, x) in millimetres."""
        depth, height, width = (n * s for n, s in zip(self.array.shape, self.spacing_mm, strict=True))
        return depth, height, width

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.array.shape)
        spacing = "x".join(f"{value:.3g}" for value in self.spacing_mm)
        memory = self.array.nbytes / 2**20
        return f"Volume(DHW {shape} {self.array.dtype}, spacing {spacing} mm, LPS, {memory:.1f} MiB)"


def to_unit_range(array: np.ndarray, window_hu: tuple[int, int] = WINDOW_HU) -> np.ndarray:
    """Map stored voxels to float32 in [0, 1]: int16 HU through the window, uint8 grey by 1/255.

    Args:
        array: stored voxels, any shape.
        window_hu: lower and upper limit of int16 voxels, as the file records it.

    Raises:
        TypeError: another dtype.
    """
    if array.dtype == np.uint8:
        return np.divide(array, np.float32(255.0), dtype=np.float32)
    if array.dtype != np.int16:
        raise TypeError(f"stored voxels are int16 (HU) or uint8 (grey), got {array.dtype}")
    low, high = window_hu
    clipped = np.clip(array, np.int16(low), np.int16(high))
    out = np.subtract(clipped, np.float32(low), dtype=np.float32)
    out /= np.float32(high - low)
    return out


def quantise_hu(unit: np.ndarray) -> np.ndarray:
    """Round values in [0, 1] to whole HU, int16: the stored form of a CT-RATE volume (error <= 0.5 HU = 2.5e-4)."""
    low, high = WINDOW_HU
    return np.rint(np.clip(unit, 0.0, 1.0) * (high - low) + low).astype(np.int16)


def quantise_grey(unit: np.ndarray) -> np.ndarray:
    """Round values in [0, 1] to 8-bit grey: the stored form of a CTRG volume (error <= 1/510)."""
    return np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)


def centre_crop(volume: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Return the central part (a view) of a three-axis array: ``int(size * fraction)`` voxels per axis.

    The crop starts at ``size // 2 - roi // 2``, as in the published loader (spec 4.3).

    Raises:
        ValueError: an axis would become empty.
    """
    roi = [int(size * fraction) for size, fraction in zip(volume.shape, fractions, strict=True)]
    if min(roi) < 1:
        raise ValueError(f"crop fractions {tuple(fractions)} of shape {volume.shape} leave nothing: {tuple(roi)}")
    starts = [max(size // 2 - part // 2, 0) for size, part in zip(volume.shape, roi, strict=True)]
    return volume[tuple(slice(start, start + part) for start, part in zip(starts, roi, strict=True))]


def resize_trilinear(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Trilinear resize of a three-axis array (half-pixel centres, no anti-aliasing) to ``size``, float32."""
    import torch  # here, so that packing data needs no torch
    from torch.nn import functional

    tensor = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None, None]
    out = functional.interpolate(tensor, size=tuple(size), mode="trilinear", align_corners=False)
    return out[0, 0].numpy()


def resampled_size(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> tuple[int, ...]:
    """Number of voxels per axis after resampling, truncated as in the published code (at least one)."""
    return tuple(max(int(n * (s / t)), 1) for n, s, t in zip(shape, spacing_mm, target_mm, strict=True))


def ct_rate_offline_resample(
    raw_xyz: np.ndarray,
    slope: float,
    intercept: float,
    spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float] = TARGET_SPACING_MM,
) -> np.ndarray:
    """Published CT-RATE preprocessing (spec 4.2): stored values -> windowed, resampled volume.

    Args:
        raw_xyz: stored values ``[X, Y, Z]`` as read from the NIfTI file.
        slope: RescaleSlope; ``slope * value + intercept`` is in HU.
        intercept: RescaleIntercept, HU.
        spacing_mm: (z, y, x) of the input; the published scripts use the first in-plane number for both x and y.
        target_spacing_mm: (z, y, x) of the output.

    Returns:
        float32 ``[Z, X, Y]`` in [-1, 1] (= HU / 1000), the array the published ``.npz`` files hold.
    """
    low, high = WINDOW_HU
    values_xyz = raw_xyz.astype(np.float64)
    values_xyz *= slope
    values_xyz += intercept
    np.clip(values_xyz, low, high, out=values_xyz)
    values_xyz /= 1000.0
    volume_zxy = values_xyz.astype(np.float32).transpose(2, 0, 1)
    spacing_zxy = [spacing_mm[0], spacing_mm[2], spacing_mm[1]]
    target_zxy = [target_spacing_mm[0], target_spacing_mm[2], target_spacing_mm[1]]
    return resize_trilinear(volume_zxy, resampled_size(volume_zxy.shape, spacing_zxy, target_zxy))


def ct_rate_online_crop_resize(
    volume_zxy: np.ndarray,
    crop_fractions: Sequence[float] = CROP_FRACTIONS_DHW,
    size: Sequence[int] = PRETRAIN_SIZE_DHW,
) -> np.ndarray:
    """Published CT-RATE loading (spec 4.3): ``arr_0`` of an ``.npz`` -> one sample image.

    Args:
        volume_zxy: ``[Z, X, Y]`` in [-1, 1].
        crop_fractions: kept part per axis (D, H, W).
        size: output size (D, H, W).

    Returns:
        float32 ``[D, 1, H, W]`` in [0, 1].
    """
    cropped_dhw = centre_crop(volume_zxy.transpose(0, 2, 1), crop_fractions).astype(np.float32)
    unit_dhw = np.clip((cropped_dhw + np.float32(1.0)) * np.float32(0.5), 0.0, 1.0)
    return resize_trilinear(unit_dhw, size)[:, None]


def centre_crop_or_pad(slice_hw: np.ndarray, size_hw: Sequence[int]) -> np.ndarray:
    """Centre crop of a grey slice ``[H, W]``; zero padding where it is smaller (extra row / column at the end)."""
    lacking = [max(want - have, 0) for want, have in zip(size_hw, slice_hw.shape, strict=True)]
    padded = np.pad(slice_hw, [(lack // 2, (lack + 1) // 2) for lack in lacking]) if any(lacking) else slice_hw
    top, left = (round((have - want) / 2.0) for want, have in zip(size_hw, padded.shape, strict=True))
    return padded[top : top + size_hw[0], left : left + size_hw[1]]


def ctrg_slice(
    slice_hw: np.ndarray, size_hw: Sequence[int] = PRETRAIN_SIZE_DHW[1:], crop_hw: Sequence[int] = CTRG_CROP_HW
) -> np.ndarray:
    """Published slice transform "clip" (spec 4.1): crop 336 x 448, bicubic resize; uint8 ``[H, W]`` -> uint8."""
    cropped = np.ascontiguousarray(centre_crop_or_pad(slice_hw, crop_hw))
    height, width = size_hw
    return np.asarray(Image.fromarray(cropped).resize((width, height), Image.Resampling.BICUBIC))


def ctrg_stack(
    slices: Sequence[np.ndarray],
    size: Sequence[int] = PRETRAIN_SIZE_DHW,
    crop_hw: Sequence[int] = CTRG_CROP_HW,
    depth_range: Sequence[float] = CTRG_DEPTH_RANGE,
) -> np.ndarray:
    """Published CTRG loading (spec 4.1): grey slices in stored order -> one sample image.

    Args:
        slices: uint8 ``[H, W]`` each, naturally sorted by file name (stored head to feet; the order is reversed here).
        size: output size (D, H, W).
        crop_hw: rows and columns kept; the published numbers belong to 512 x 512 slices.
        depth_range: part of the slices kept, from and to, as fractions of their number.

    Returns:
        float32 ``[D, 1, H, W]`` in [0, 1].

    Raises:
        ValueError: too few slices: the depth crop leaves none.
    """
    count = len(slices)
    low, high = (int(fraction * count) for fraction in depth_range)
    if high <= low:
        raise ValueError(f"{count} slice(s): the depth crop {tuple(depth_range)} leaves none")
    kept = [slices[count - 1 - position] for position in range(low, high)]
    # nearest along depth (floor(k * n / D)): only the slices that are used are transformed
    source = [k * len(kept) // size[0] for k in range(size[0])]
    resized = {index: ctrg_slice(kept[index], size[1:], crop_hw) for index in set(source)}
    stack = np.stack([resized[index] for index in source])
    return to_unit_range(stack)[:, None]
