"""Small data sets for the tests of the gallery: packed rows, raw trees, and a reader of the pages."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image

from mg3d.datasets.arrow_schema import make_row_batch, make_schema
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.datasets.report_text import split_fragments

FINDINGS = "Trachea, both main bronchi are open. No pleural effusion was detected."
IMPRESSION = "Normal thorax CT, no nodule."
SHAPE_DHW = (12, 10, 14)
SPACING_MM = (3.0, 2.0, 1.5)
VOID = {"meta", "link", "img", "input", "br"}
SVG_SINGLE = {"rect", "line"}


def marked(shape: Sequence[int] = SHAPE_DHW) -> np.ndarray:
    """Air with one bright block in the superior, anterior, right corner."""
    volume = np.full(tuple(shape), -1000, np.int16)
    volume[-3:, :3, :3] = 1000
    return volume


def noise(seed: int, shape: Sequence[int] = SHAPE_DHW) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, tuple(shape)).astype(np.int16)


def write_rows(
    path: Path,
    rows: Sequence[dict[str, Any]],
    *,
    grey: bool = False,
    compression: str | None = None,
    window: str = "[-1000,1000]",
) -> Path:
    geometry = {"crop_fractions": [1, 1, 1], "size": list(SHAPE_DHW), "target_spacing_mm": None, "store": "crop"}
    names = [] if grey else CT_RATE_LABELS
    schema = make_schema(geometry=geometry, label_names=names, window_hu="grey8" if grey else window)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for number, changes in enumerate(rows):
            writer.write_batch(_batch(schema, number, path.stem.rpartition("_"), grey, changes))
    return path


def _batch(schema: pa.Schema, number: int, name: tuple[str, str, str], grey: bool, changes: dict[str, Any]) -> Any:
    row: dict[str, Any] = {
        "image": noise(number),
        "image_id": f"{name[2]}_{number}_a_1",
        "patient_id": f"{name[2]}_{number}",
        "corpus": name[0],
        "split": name[2],
        "findings": f"{FINDINGS} Case {number}.",
        "impression": IMPRESSION,
        "spacing_mm": SPACING_MM,
        "labels": [] if grey else [number % 2] * 17 + [-1],
    } | changes
    if grey:
        row["image"] = (noise(number) // 8 + 126).astype(np.uint8)
    sections = {f"{key}_sen": split_fragments(row[key]) for key in ("findings", "impression")}
    return make_row_batch(schema, **sections, **row)


def damage(path: Path, pattern: bytes) -> None:
    """Flip one bit of the first occurrence of ``pattern``."""
    data = bytearray(path.read_bytes())
    place = data.index(pattern)
    data[place] ^= 1
    path.write_bytes(data)


def chest(seed: int = 0, shape: tuple[int, int, int] = (30, 26, 20)) -> np.ndarray:
    """HU volume [X,Y,Z] in LPS order: a body with two unlike lungs."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    volume = np.full(shape, -1000.0)
    volume[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = 40
    volume[((x + 0.4) / 0.3) ** 2 + ((y - 0.1) / 0.5) ** 2 + ((z - 0.2) / 0.9) ** 2 < 1] = -850
    return np.clip(volume + np.random.default_rng(seed).normal(0, 15, shape), -1024, 3000).astype(np.int16)


def save_nifti(path: Path, voxels_lps: np.ndarray, axes: str = "LPS") -> Path:
    """Write an LPS volume with its array reordered to ``axes`` and a header that says so."""
    image = nib.Nifti1Image(voxels_lps, np.diag([-2.0, -2.5, 3.0, 1.0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(axes))), path)
    return path


def ct_rate_tree(root: Path, axes: Sequence[str]) -> Path:
    """Write a CT-RATE download whose volumes are the same chest stored along different axes."""
    names = [f"train_{number}_a_1" for number in range(1, len(axes) + 1)]
    for name, code in zip(names, axes, strict=True):
        patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
        save_nifti(root / "dataset" / "train" / patient / scan / f"{name}.nii.gz", chest(), code)
    write_csv(
        root / "dataset" / "radiology_text_reports" / "train_reports.csv",
        ["VolumeName", "Findings_EN", "Impressions_EN"],
        [[f"{name}.nii.gz", FINDINGS, IMPRESSION] for name in names],
    )
    return root


def ctrg_tree(root: Path) -> Path:
    """Write a CTRG download of two slice folders with its annotation."""
    entries = []
    for number in range(2):
        folder = root / "Chest" / str(number)
        folder.mkdir(parents=True)
        for index in range(24):
            Image.fromarray(np.full((32, 32), 5 * index + 20, np.uint8)).save(folder / f"{index + 1}.png")
        entry = {"id": f"{number}.nii.gz", "report": FINDINGS, "result": IMPRESSION, "image_path": f"Chest/{number}"}
        entries.append(entry)
    (root / "annotation.json").write_text(json.dumps({"train": entries, "val": [], "test": []}))
    return root


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


class Page(HTMLParser):
    """A page taken apart: links, element names, text, and whether every element was closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.names: list[str] = []
        self.attributes: list[dict[str, str]] = []
        self.text: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == [], f"{path.name}: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.names.append(tag)
        self.attributes.append({"tag": tag, **values})
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag not in VOID:
            self._open.append((tag, values.get("id", "")))

    def handle_endtag(self, tag: str) -> None:
        if tag not in SVG_SINGLE or (self._open and self._open[-1][0] == tag):
            assert self._open, f"{self.path.name}: </{tag}> closes nothing"
            assert self._open.pop()[0] == tag, f"{self.path.name}: </{tag}> out of order"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_data(self, data: str) -> None:
        key = next((name for tag, name in reversed(self._open) if name), "") if self._open else ""
        self.text[key] = self.text.get(key, "") + data

    @property
    def all_text(self) -> str:
        return " ".join(self.text.values())
