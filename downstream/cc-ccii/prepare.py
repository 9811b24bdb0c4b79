"""CC-CCII slices to one array a scan, ``p<patient>-s<scan>.npy``: uint8 [depth, size, size]; and the list of scans."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d.errors import DataError
from mg3d.files import write_csv
from mg3d.finetuning.prepared import Job, prepare_arrays, prepared_folder
from mg3d.finetuning.scan_lists import COLUMNS, scan_name
from mg3d.scans.slice_series import SliceSeries, find_series, series_to_array

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

CLASSES = ("Normal", "CP", "NCP")
LIST = "scans.csv"


def settings(cfg: FinetuneConfig) -> dict[str, Any]:
    """All that decides what the arrays hold."""
    return {key: cfg.extra[key] for key in ("depth", "image_size", "depth_rule")}


def arrays_folder(cfg: FinetuneConfig) -> Path:
    """Folder of the arrays of a config."""
    return prepared_folder(cfg.work_dir, settings(cfg))


def find_scans(root: Path) -> list[SliceSeries]:
    """Scans of the three classes: zip files, or folders ``<class>/<patient_id>/<scan_id>``."""
    return [scan for scan in find_series(root) if scan.parts[0] in CLASSES]


def prepare(cfg: FinetuneConfig) -> None:
    """Make the arrays of all scans that have none yet, and list the scans.

    Raises:
        DataError: no scan in the folder, or not one could be read.
    """
    root, folder = Path(cfg.data_root), arrays_folder(cfg)
    scans = find_scans(root)
    if not scans:
        raise DataError("no zip file and no folder of slices", "set data_root to the download", path=str(root))
    jobs = [Job(scan_name(*scan.parts[1:]), scan) for scan in scans]
    convert: Callable[[SliceSeries], Any] = partial(
        series_to_array, depth=cfg.extra["depth"], size=cfg.extra["image_size"], rule=cfg.extra["depth_rule"]
    )
    prepare_arrays(folder, settings(cfg), jobs, convert, cfg.num_workers)
    rows = ((s.container.name, CLASSES.index(s.parts[0]), *s.parts, len(s.slices)) for s in scans)
    write_csv(folder / LIST, COLUMNS, rows)
