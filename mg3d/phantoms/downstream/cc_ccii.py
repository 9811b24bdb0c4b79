"""A drawn CC-CCII download: zip files of 8-bit slices, a folder a scan (downstream section 5).

``ROOT/NCP-1.zip`` holds ``NCP/<patient_id>/<scan_id>/0000.png ...``; CP and Normal likewise (JPEG for CP).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mg3d.files import write_csv
from mg3d.phantoms.canvas import Grid
from mg3d.phantoms.chest import ChestCase, render
from mg3d.phantoms.findings import draw_lesion
from mg3d.phantoms.studies import FIELD_MM

__all__ = ["CLASSES", "SPLIT_COLUMNS", "write_cc_ccii"]

CLASSES = ("Normal", "CP", "NCP")
SPLIT_COLUMNS = (
    "zip_file",
    "target",
    "label",
    "patient_id",
    "scan_id",
    "n_slice",
    "scan_count",
    "all_scan_ids",
)
_FINDINGS = {"Normal": (), "CP": ("Consolidation",), "NCP": ("Lung opacity",)}
_WINDOW_HU = (-1200.0, 600.0)


def write_cc_ccii(
    root: Path,
    *,
    patients: int = 10,
    size: int = 128,
    slices: tuple[int, int] = (14, 28),
    folds: int = 0,
    seed: int = 0,
) -> None:
    """Write the data set; every third patient has two scans.

    Args:
        root: folder that receives the zip files.
        patients: patients of each class.
        size: rows and columns of a slice (512 in the published data).
        slices: fewest and most slices of a scan.
        folds: number of published-form split tables to write as well; 0 for none.
        seed: seed of everything.
    """
    root.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[object, ...]] = []
    for target, label in enumerate(CLASSES):
        for part in (1, 2):
            members = [number for number in range(patients) if number % 2 == part - 1]
            with zipfile.ZipFile(root / f"{label}-{part}.zip", "w") as archive:
                for number in members:
                    rows += _write_patient(archive, target, number, size, slices, seed)
    for fold in range(folds):
        held = [row for row in rows if int(str(row[3])) % folds == fold]
        rest = [row for row in rows if int(str(row[3])) % folds != fold]
        for name, part_rows in (("train", rest), ("valid", held)):
            write_csv(root / f"CC_CCII_fold{fold}_{name}.csv", SPLIT_COLUMNS, part_rows)


def _write_patient(
    archive: zipfile.ZipFile, target: int, number: int, size: int, slices: tuple[int, int], seed: int
) -> list[tuple[object, ...]]:
    label, patient = CLASSES[target], 1000 * (target + 1) + number
    rng = np.random.default_rng((seed, 41, patient))
    lesions = tuple(draw_lesion(name, rng) for name in _FINDINGS[label])
    anatomy = int(rng.integers(2**31))
    scans = [3 * patient, 3 * patient + 1][: 2 if number % 3 == 0 else 1]
    rows: list[tuple[object, ...]] = []
    for scan in scans:
        depth = int(rng.integers(slices[0], slices[1] + 1))
        images = _draw(ChestCase(anatomy, int(rng.integers(2**31)), lesions), depth, size)
        ending = "jpg" if label == "CP" else "png"
        for place, image in enumerate(images):
            archive.writestr(f"{label}/{patient}/{scan}/{place:04d}.{ending}", _encode(image, ending))
        name = Path(str(archive.filename)).name
        rows.append((name, target, label, patient, scan, depth, len(scans), str(list(scans))))
    return rows


def _draw(case: ChestCase, depth: int, size: int) -> Sequence[np.ndarray]:
    """Slices from the head down, 8-bit."""
    grid = Grid((32, size, size), (FIELD_MM[0] / 32, FIELD_MM[1] / size, FIELD_MM[2] / size))
    low, high = _WINDOW_HU
    grey = np.rint((np.clip(render(case, grid).hu, low, high) - low) / (high - low) * 255).astype(np.uint8)
    used = np.linspace(31, 0, depth).round().astype(int)
    return [grey[place] for place in used]


def _encode(image: np.ndarray, ending: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG" if ending == "jpg" else "PNG")
    return stream.getvalue()
