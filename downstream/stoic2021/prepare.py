"""STOIC scans to one array a patient: 1.6 mm, a box of 240 voxels, window -1100..300 HU, resized; float16 in [0, 1]."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.datasets.fitting import centred_start, cut_block, resize_linear, window_to_unit
from mg3d.finetuning.prepared import Job, prepare_arrays, prepared_folder
from mg3d.paths import visible_files

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

SPACING_MM = 1.6
BOX = 240
WINDOW_HU = (-1100.0, 300.0)
WATER_HU = 0.0
SCANS = Path("data", "mha")


def settings(cfg: FinetuneConfig) -> dict[str, Any]:
    """All that decides what the arrays hold."""
    size = list(cfg.roi or (128, 128, 128))
    published = cfg.protocol == "reference"
    return {"spacing_mm": SPACING_MM, "box": BOX, "window_hu": WINDOW_HU, "size": size, "published": published}


def arrays_folder(cfg: FinetuneConfig) -> Path:
    """Folder of the arrays of a config: ``<PatientID>.npy``."""
    return prepared_folder(cfg.work_dir, settings(cfg))


def prepare(cfg: FinetuneConfig) -> None:
    """Make the arrays of all scans that have none yet.

    Raises:
        DataError: no scan there, or not one could be read.
    """
    jobs = [Job(path.stem, path) for path in visible_files(Path(cfg.data_root) / SCANS, "*.mha")]
    chosen = settings(cfg)
    convert = partial(scan_to_array, size=chosen["size"], published=chosen["published"])
    prepare_arrays(arrays_folder(cfg), chosen, jobs, convert, cfg.num_workers)


def scan_to_array(path: Path, size: tuple[int, int, int], published: bool = False) -> np.ndarray:
    """Read one scan and bring it to the network's grid.

    Args:
        path: MetaImage file in HU.
        size: voxels (D, H, W) of the result.
        published: keep the stored order of the axes, the last 240 slices and a filling of 0 HU, as published; else
            canonical order, centred, filled with air.

    Raises:
        DataError: the scan cannot be read.
    """
    from mg3d.datasets.volume import resampled_size
    from mg3d.scans.geometry import to_canonical
    from mg3d.scans.prepare import choose_spacing, fill_nonfinite, nonfinite_voxels
    from mg3d.scans.read import read_scan

    raw = read_scan(path)
    fill_nonfinite(raw, nonfinite_voxels(raw), WINDOW_HU[0])
    xyz = choose_spacing(raw, None, None)[0]
    hu, spacing = raw.voxels_xyz.transpose(2, 1, 0), xyz[::-1]
    if not published:
        hu, spacing, _ = to_canonical(raw.voxels_xyz, raw.affine, xyz, fill=WINDOW_HU[0], limits=WINDOW_HU)
        hu = np.clip(hu, *map(int, WINDOW_HU))  # before any interpolation: metal must not bleed into its neighbours
    even = resize_linear(hu, resampled_size(hu.shape, spacing, (SPACING_MM,) * 3))
    return resize_linear(window_to_unit(fit_box(even, published), WINDOW_HU), size).astype(np.float16)


def fit_box(hu: np.ndarray, published: bool = False) -> np.ndarray:
    """Crop and fill to 240 voxels an axis: centred with air, or (published) the last slices with 0 HU."""
    starts = [centred_start(length, BOX) for length in hu.shape]
    if published:
        starts[0] = hu.shape[0] - BOX
    return cut_block(hu, starts, (BOX,) * 3, WATER_HU if published else WINDOW_HU[0])
