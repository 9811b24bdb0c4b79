"""Small labelled images in any geometry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mg3d.finetuning.benchmark import Case, SegmentationTask

LABELS = {1: 1, 2: 2}


def turned(angle_deg: float, spacing: Sequence[float]) -> np.ndarray:
    """Affine of an image turned about the third and then a little about the first axis."""
    a, b = np.radians(angle_deg), np.radians(angle_deg / 2)
    third = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    first = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = first @ third @ np.diag(spacing)
    affine[:3, 3] = (-20.0, 15.0, 40.0)
    return affine


def permuted(spacing: Sequence[float]) -> np.ndarray:
    """Stored axes run to superior, left, anterior."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = spacing[0], -spacing[1], spacing[2], 1.0
    affine[:3, 3] = (30.0, -10.0, 5.0)
    return affine


AFFINES: dict[str, np.ndarray] = {
    "anisotropic": np.diag([1.5, 1.5, 4.0, 1.0]),
    "lps": np.diag([-1.5, -1.5, 3.0, 1.0]),
    "flipped_z": np.array([[1.5, 0, 0, -30], [0, 1.5, 0, -20], [0, 0, -3.0, 60], [0, 0, 0, 1]]),
    "permuted": permuted((3.0, 1.5, 1.5)),
    "oblique": turned(20.0, (1.5, 1.5, 3.0)),
}


def two_balls(shape: Sequence[int]) -> np.ndarray:
    """uint8 labels: a large ball 1 off the centre, and a small ball 2."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    labels = np.zeros(shape, dtype=np.uint8)
    labels[(axes[0] + 0.25) ** 2 + axes[1] ** 2 + (axes[2] - 0.1) ** 2 < 0.3] = 1
    labels[(axes[0] - 0.6) ** 2 + (axes[1] - 0.4) ** 2 + (axes[2] + 0.3) ** 2 < 0.06] = 2
    return labels


def ct_of(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """int16 HU: lung, a soft ball and a bright ball, noise."""
    values = np.array([-800.0, 60.0, 400.0])[labels]
    return (values + np.random.default_rng(seed).normal(0, 20, labels.shape)).astype(np.int16)


def write_volume(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def write_case(
    folder: Path,
    name: str = "case",
    affine: np.ndarray = AFFINES["lps"],
    shape: Sequence[int] = (40, 36, 20),
    seed: int = 0,
) -> Case:
    """A labelled image on disk."""
    labels = two_balls(shape)
    image = write_volume(folder / f"{name}.nii.gz", ct_of(labels, seed), affine)
    return Case(name, f"p_{name}", image, write_volume(folder / f"{name}_seg.nii.gz", labels, affine))


def task(**changes: Any) -> SegmentationTask:
    settings: dict[str, Any] = {
        "classes": ("soft", "bright"),
        "label_map": LABELS,
        "window": (-1000.0, 500.0),
        "roi": (32, 32, 32),
    }
    return SegmentationTask(**(settings | changes))
