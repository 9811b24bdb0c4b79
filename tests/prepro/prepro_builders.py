"""Tiny CT-RATE and CTRG downloads for the tests."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image
from real_ct import REPORT_COLUMNS, write_table

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.scans.geometry import Geometry
from prepro.readers.base import Case, CaseList, PackedImage

SMALL = Geometry(size=(8, 6, 8), target_spacing_mm=None)
FINDINGS = "Trachea, both main bronchi are open. No pleural effusion was detected."
IMPRESSION = "Normal thorax CT, no nodule."


def chest(seed: int = 0, shape: tuple[int, int, int] = (30, 26, 20)) -> np.ndarray:
    """HU volume [X,Y,Z] in LPS index order: a body with two unlike lungs, so that every flip shows."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    volume = np.full(shape, -1000.0)
    volume[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = 40
    volume[((x + 0.4) / 0.3) ** 2 + ((y - 0.1) / 0.5) ** 2 + ((z - 0.2) / 0.9) ** 2 < 1] = -850
    volume[((x - 0.4) / 0.2) ** 2 + ((y + 0.1) / 0.4) ** 2 + (z / 0.6) ** 2 < 1] = -820
    return np.clip(volume + rng.normal(0, 15, shape), -1024, 3000).astype(np.int16)


def save_nifti(
    path: Path, voxels_lps: np.ndarray, spacing: tuple[float, float, float] = (2.0, 2.5, 3.0), axes: str = "LPS"
) -> Path:
    """Write an LPS volume with its array reordered to ``axes`` and a header that says so."""
    image = nib.Nifti1Image(voxels_lps, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
    image = image.as_reoriented(ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(axes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def ct_rate_tree(root: Path, train: int = 4, valid: int = 2, offset: int = 0, reconstructions: int = 1) -> Path:
    """Write a CT-RATE download; stored values are ``HU - offset`` and the metadata table names the offset."""
    for split, count, (reports_name, labels_name) in (
        ("train", train, ("train", "train")),
        ("valid", valid, ("validation", "valid")),
    ):
        names = []
        for patient in range(1, count + 1):
            for reconstruction in range(1, reconstructions + 1):
                name = f"{split}_{patient}_a_{reconstruction}"
                folder = root / "dataset" / split / f"{split}_{patient}" / f"{split}_{patient}_a"
                seed = patient + 100 * (split == "valid") + 1000 * reconstruction
                save_nifti(folder / f"{name}.nii.gz", (chest(seed) - offset).astype(np.int16))
                names.append(f"{name}.nii.gz")
        write_tables(root, reports_name, labels_name, names, offset)
    return root


def write_tables(root: Path, reports_name: str, labels_name: str, names: list[str], offset: int) -> None:
    """Write the three published tables of one split."""
    base = root / "dataset"
    rows = [(name, "cough", "CT", f"{FINDINGS} Case {name.split('_')[1]}.", IMPRESSION) for name in names]
    write_table(base / "radiology_text_reports" / f"{reports_name}_reports.csv", REPORT_COLUMNS, rows)
    labels = [(name, *[number % 2 for number in range(len(CT_RATE_LABELS))]) for name in names]
    header = ("VolumeName", *CT_RATE_LABELS)
    write_table(base / "multi_abnormality_labels" / f"{labels_name}_predicted_labels.csv", header, labels)
    header = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
    metadata = [(name, 1, offset, "[2.0, 2.5]", 3.0) for name in names]
    write_table(base / "metadata" / f"{reports_name}_metadata.csv", header, metadata)


def slices_of(seed: int, count: int = 20, size: int = 32) -> np.ndarray:
    """Grey slices [Z,H,W], every one of another mean."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 220, count)[:, None, None]
    return np.clip(ramp + rng.normal(0, 5, (count, size, size)), 0, 255).astype(np.uint8)


def ctrg_tree(root: Path, train: int = 10, test: int = 3, suffix: str = "png") -> Path:
    """Write a CTRG download of slice folders with its annotation JSON; returns the JSON."""
    groups: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}
    for number in range(train + test):
        folder = root / "Chest" / str(number)
        folder.mkdir(parents=True)
        stack = slices_of(number)
        files = [f"Chest/{number}/{index + 1}.{suffix}" for index in range(len(stack))]
        for file, pixels in zip(files, stack, strict=True):
            Image.fromarray(pixels).save(root / file)
        split = "train" if number < train else "test"
        entry: dict[str, object] = {
            "id": f"{number}.nii.gz",
            "report": FINDINGS,
            "result": IMPRESSION,
            "image_path": files[::-1],
            "split": split,
        }
        groups[split].append(entry)
        if split == "test":
            groups["val"].append({**entry, "split": "val"})
    annotation = root / "annotation.json"
    annotation.write_text(json.dumps(groups))
    return annotation


class KilledReader:
    """A reader whose process dies on the first scan, as the out-of-memory killer does it."""

    corpus = "clm_ct_rate"
    label_names = CT_RATE_LABELS
    window = "[-1000,1000]"

    def find_cases(self) -> CaseList:
        return CaseList()

    def load(self, case: Case) -> PackedImage:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")
