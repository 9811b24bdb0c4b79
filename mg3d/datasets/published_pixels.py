"""Pixels of the published Arrow layouts: encoded slices in the row, or a path to a preprocessed ``.npz`` file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from mg3d.datasets.volume import PRETRAIN_SIZE_DHW, ct_rate_online_crop_resize, ctrg_stack
from mg3d.errors import DataError
from mg3d.scans.grey_slices import grey_pixels


def decode_slices(slices: Sequence[bytes], case_id: str, size_dhw: Sequence[int] = PRETRAIN_SIZE_DHW) -> np.ndarray:
    """Return float32 ``[D, H, W]`` in [0, 1] from the encoded slices of a published CTRG row, in stored order.

    Raises:
        DataError: a slice is no image with 8-bit grey values, or there are too few.
    """
    try:
        grey = [grey_pixels(data or b"", case_id=case_id, name=f"slice {number}") for number, data in enumerate(slices)]
        return ctrg_stack(grey, size_dhw)[:, 0]
    except ValueError as error:
        raise DataError(f"slices cannot be read: {error}", "pack the scan again", case_id=case_id) from error


def load_npz(image_id: str, image_root: str | Path, size_dhw: Sequence[int] = PRETRAIN_SIZE_DHW) -> np.ndarray:
    """Return float32 ``[D, H, W]`` in [0, 1] from the preprocessed file an ``image_id`` names.

    The id may be relative to ``image_root`` or carry the folders of another machine, which are dropped from the left
    until a file is found. Both published endings are accepted (``.npz`` and ``.nii.gz.npz``, defect 13).

    Raises:
        DataError: not found below ``image_root``, or the file is damaged.
    """
    path = _locate(image_id, image_root)
    try:
        with np.load(path, allow_pickle=False) as archive:
            volume_zxy = archive["arr_0"]
        if volume_zxy.ndim != 3:
            raise ValueError(f"arr_0 has shape {volume_zxy.shape}, expected (Z, X, Y)")
        return ct_rate_online_crop_resize(volume_zxy, size=size_dhw)[:, 0]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot be read: {error}", "preprocess the scan again", case_id=image_id, path=str(path)
        ) from error


def _locate(image_id: str, image_root: str | Path) -> Path:
    if not str(image_root):
        raise DataError(
            "the row holds a path, no pixels", "set image_root to the folder of the .npz files", case_id=image_id
        )
    root = Path(image_root).expanduser().resolve()
    parts = [part for part in PurePosixPath(image_id).parts if part not in ("/", ".")]
    if ".." in parts:
        raise DataError("image_id leaves the image root", "use ids below image_root", case_id=image_id)
    for start in range(len(parts)):
        below = root.joinpath(*parts[start:])
        stem = below.name.removesuffix(".npz").removesuffix(".nii.gz")
        for name in dict.fromkeys((below.name, f"{stem}.npz", f"{stem}.nii.gz.npz")):
            path = below.with_name(name).resolve()
            if path.suffix == ".npz" and path.is_file() and path.is_relative_to(root):
                return path
    raise DataError(f"no .npz file below {root}", "mend image_root or pack the pixels with prepro", case_id=image_id)
