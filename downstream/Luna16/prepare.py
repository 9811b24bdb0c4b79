"""LUNA16 scans to one array of cubes a scan: uint8 [n, 48, 48, 48], in the order of the scan's candidates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.finetuning.nodule_tables import read_candidates, table_path
from mg3d.finetuning.prepared import Job, file_digest, prepare_arrays, prepared_folder
from mg3d.paths import visible_files

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

EDGE = 48
WINDOW_HU = (-1000.0, 600.0)


def find_scans(root: Path) -> dict[str, tuple[int, Path]]:
    """Series uid -> (number of its subset, header file)."""
    return {path.stem: (int(path.parent.name[6:]), path) for path in visible_files(root, "subset[0-9]/*.mhd")}


def settings(cfg: FinetuneConfig) -> dict[str, Any]:
    """All that decides what the cubes hold."""
    table = table_path(Path(cfg.data_root), "candidates.csv")
    published = cfg.protocol == "reference"
    return {"edge": EDGE, "window_hu": WINDOW_HU, "published": published, "candidates": file_digest(table)}


def cubes_folder(cfg: FinetuneConfig) -> Path:
    """Folder of the arrays of a config: ``subset0/<seriesuid>.npy`` and so on."""
    return prepared_folder(cfg.work_dir, settings(cfg))


def prepare(cfg: FinetuneConfig) -> None:
    """Cut the cubes of all scans that have none yet.

    Raises:
        DataError: no table of candidates, or not one scan could be used.
    """
    candidates, scans = read_candidates(Path(cfg.data_root)), find_scans(Path(cfg.data_root))
    jobs = [
        Job(f"subset{subset}/{uid}", (path, candidates[uid].world_mm))
        for uid, (subset, path) in scans.items()
        if uid in candidates
    ]
    convert = partial(scan_to_cubes, published=cfg.protocol == "reference")
    prepare_arrays(cubes_folder(cfg), settings(cfg), jobs, convert, cfg.num_workers)


def scan_to_cubes(source: tuple[Path, np.ndarray], published: bool = False) -> np.ndarray:
    """Read one scan and cut a cube round each of the places [n, 3] in mm: uint8 [n, 48, 48, 48].

    Raises:
        DataError: the scan cannot be read, or a candidate lies far outside.
    """
    from mg3d.scans.read import read_scan
    from mg3d.scans.world_cubes import cubes_at

    path, world_mm = source
    return cubes_at(read_scan(path), world_mm, EDGE, WINDOW_HU, published)
