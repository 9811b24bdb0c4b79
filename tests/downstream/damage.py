"""Ways in which a download can be wrong."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np


def cut(path: Path, share: float = 0.6) -> None:
    """Keep the first part of a file, as a broken download does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip_a_byte(path: Path) -> None:
    """Change one byte in the middle of the compressed voxels; the length stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def rewrite(path: Path, *, voxels: np.ndarray | None = None, affine: np.ndarray | None = None) -> None:
    """Store other voxels or another place in a NIfTI file."""
    image = nib.load(path)
    values = np.asarray(image.dataobj) if voxels is None else voxels
    nib.save(nib.Nifti1Image(values, image.affine if affine is None else affine), path)


def shifted(path: Path, mm: float) -> np.ndarray:
    """The affine of a file, moved along x."""
    affine = nib.load(path).affine.copy()
    affine[0, 3] += mm
    return affine


def voxels_of(path: Path) -> np.ndarray:
    """The stored voxels of a file."""
    return np.asarray(nib.load(path).dataobj)
