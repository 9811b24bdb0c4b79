"""Random training crops of a prepared case: where they lie, and how they are changed. No torch.

Zoom, rotation, scaling and shift are one linear map round the middle of the crop, read from the whole volume, so that
no border appears inside a crop. Everything follows from the generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mg3d.datasets.fitting import clamped_start, cut_block

if TYPE_CHECKING:
    from mg3d.datasets.segmentation_case import PreparedCase
    from mg3d.finetuning.benchmark import AugmentationOptions, SegmentationTask

__all__ = ["CropCentres", "draw_crops"]

_TRIES = 200


class CropCentres:
    """Draws the middles of crops: on foreground with a fixed share, else on background inside the image.

    Args:
        label: uint8 [X,Y,Z].
        image: [X,Y,Z]; background centres lie where it is not 0 (``above_zero``: where it is above 0, as published).
        positive_share: probability of a foreground centre; without foreground, or background, the other is taken.
        above_zero: see ``image``.
    """

    def __init__(self, label: np.ndarray, image: np.ndarray, positive_share: float, above_zero: bool = False) -> None:
        self.label, self.image, self.above_zero = label, image, above_zero
        self.positive_share = positive_share
        self._foreground = np.flatnonzero(label)
        self._background: np.ndarray | None = None

    def draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """Return one centre [x, y, z]."""
        positive = rng.random() < self.positive_share
        if positive and self._foreground.size:
            return self._place(int(self._foreground[rng.integers(self._foreground.size)]))
        for _ in range(_TRIES):  # nearly always the first ones hit, without a list of all background voxels
            index = int(rng.integers(self.label.size))
            if self._is_background(self._place(index)):
                return self._place(index)
        return self._from_lists(rng)

    def _from_lists(self, rng: np.random.Generator) -> tuple[int, int, int]:
        if self._background is None:
            inside = self.image > 0 if self.above_zero else self.image != 0
            self._background = np.flatnonzero((np.asarray(self.label) == 0) & inside)
        found = self._background if self._background.size else self._foreground
        index = int(found[rng.integers(found.size)]) if found.size else int(rng.integers(self.label.size))
        return self._place(index)

    def _is_background(self, place: tuple[int, int, int]) -> bool:
        value = self.image[place]
        return self.label[place] == 0 and (value > 0 if self.above_zero else value != 0)

    def _place(self, index: int) -> tuple[int, int, int]:
        x, y, z = np.unravel_index(index, self.label.shape)
        return int(x), int(y), int(z)


def draw_crops(
    prepared: PreparedCase, task: SegmentationTask, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut and change ``task.crops_per_volume`` crops.

    Args:
        prepared: a case with a label map.
        task: roi, shares of foreground and background, augmentation.
        rng: source of all chance.

    Returns:
        images float32 [K,X,Y,Z] and labels uint8 [K,X,Y,Z], 0 beyond the border of the volume.

    Raises:
        ValueError: a case without labels, or no positive weight.
    """
    if prepared.label is None:
        raise ValueError("training crops need a label map")
    weight = task.positive + task.negative
    if min(task.positive, task.negative) < 0 or weight <= 0:
        raise ValueError(f"positive={task.positive} and negative={task.negative} must be weights, not both 0")
    published = task.foreground_crop == "reference_zscore"
    centres = CropCentres(prepared.label, prepared.image, task.positive / weight, above_zero=published)
    images, labels = [], []
    for _ in range(task.crops_per_volume):
        image, label = _cut(prepared, prepared.label, centres.draw(rng), task, rng)
        image, label = _turn(image, label, task.augmentation, rng)
        images.append(_intensities(image, task.augmentation, rng))
        labels.append(np.ascontiguousarray(label))
    return np.stack(images), np.stack(labels)


def _cut(
    prepared: PreparedCase,
    label: np.ndarray,
    centre: Sequence[int],
    task: SegmentationTask,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    roi = task.roi
    start = [clamped_start(at, size, edge) for at, size, edge in zip(centre, label.shape, roi, strict=True)]
    matrix, shift = _draw_map(task.augmentation, rng)
    if matrix is None:
        return cut_block(prepared.image, start, roi, 0.0), cut_block(label, start, roi, 0)
    from scipy import ndimage

    middle = (np.asarray(roi) - 1) / 2
    offset = np.asarray(start) + middle + shift - matrix @ middle
    where = {"matrix": matrix, "offset": offset, "output_shape": tuple(roi), "mode": "constant", "cval": 0}
    image = ndimage.affine_transform(prepared.image, order=1, output=np.float32, **where)
    return image, ndimage.affine_transform(label, order=0, output=np.uint8, **where)


def _draw_map(options: AugmentationOptions, rng: np.random.Generator) -> tuple[np.ndarray | None, np.ndarray]:
    """Matrix from crop to volume positions round the middle, and shift in voxels; None where nothing changes."""
    matrix, shift, changed = np.eye(3), np.zeros(3), False
    if options.zoom_p > 0 and rng.random() < options.zoom_p:
        matrix, changed = matrix / rng.uniform(*options.zoom_range), True
    if options.affine_p > 0 and rng.random() < options.affine_p:
        angles = rng.uniform(-1, 1, 3) * options.affine_rotate_rad
        factors = 1 + rng.uniform(-1, 1, 3) * options.affine_scale
        shift = rng.uniform(-1, 1, 3) * options.affine_translate_voxels
        matrix, changed = _rotation(angles) @ np.diag(factors) @ matrix, True
    return (matrix if changed else None), shift


def _rotation(angles_rad: np.ndarray) -> np.ndarray:
    """Rotation about the first, then the second, then the third axis."""
    result = np.eye(3)
    for axis, angle in enumerate(angles_rad):
        one, other = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def _turn(
    image: np.ndarray, label: np.ndarray, options: AugmentationOptions, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    if options.flip_p > 0:
        axes = tuple(axis for axis in range(3) if rng.random() < options.flip_p)
        image, label = np.flip(image, axes), np.flip(label, axes)
    if options.rot90_p > 0 and rng.random() < options.rot90_p:
        turns = int(rng.integers(1, options.rot90_max + 1))
        if image.shape[0] != image.shape[1]:
            turns = 2  # the only turn that keeps the shape
        image, label = np.rot90(image, turns), np.rot90(label, turns)
    return image, label


def _intensities(image: np.ndarray, options: AugmentationOptions, rng: np.random.Generator) -> np.ndarray:
    image = np.array(image, dtype=np.float32, order="C")
    if options.intensity_scale_p > 0 and rng.random() < options.intensity_scale_p:
        image *= np.float32(1 + rng.uniform(-options.intensity_scale, options.intensity_scale))
    if options.intensity_shift_p > 0 and rng.random() < options.intensity_shift_p:
        image += np.float32(rng.uniform(-options.intensity_shift, options.intensity_shift))
    if options.noise_p > 0 and rng.random() < options.noise_p:
        deviation = rng.uniform(0.0, options.noise_std)  # as MONAI draws it
        image += rng.normal(0.0, deviation, image.shape).astype(np.float32)
    return image
