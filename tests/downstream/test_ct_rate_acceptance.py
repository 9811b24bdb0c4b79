"""CT-RATE's published preprocessing, from a volume in the published tree to what the network sees."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from folders import config, load_folder

from mg3d.datamodules.vocabulary import FeatureDataset
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.datasets.volume import TARGET_SPACING_MM, ct_rate_offline_resample
from mg3d.finetuning.benchmark import VocabularyTask
from mg3d.phantoms.downstream.ct_rate import write_ct_rate

NAME = "valid_1_a_1"
TEXTS = {"ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"}
COLUMNS = {
    "radiology_text_reports/validation_reports.csv": {"VolumeName", *TEXTS},
    "multi_abnormality_labels/valid_predicted_labels.csv": {"VolumeName", *CT_RATE_LABELS},
    "metadata/validation_metadata.csv": {"VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"},
}
folder = load_folder("CT-RATE")


def preprocess(root: Path) -> tuple[np.ndarray, Path]:
    """The published offline step on one volume: its array, under the published name, in place of the NIfTI file."""
    data = root / "dataset"
    source = data / "valid" / "valid_1" / "valid_1_a" / f"{NAME}.nii.gz"
    for table, names in COLUMNS.items():
        with (data / table).open(encoding="utf-8") as stream:
            rows = {row["VolumeName"]: row for row in csv.DictReader(stream)}
        assert names <= set(rows[source.name])
    row = rows[source.name]
    in_plane = json.loads(row["XYSpacing"])
    spacing = (float(row["ZSpacing"]), in_plane[1], in_plane[0])
    raw = np.asarray(nib.load(source).dataobj)
    found = ct_rate_offline_resample(raw, float(row["RescaleSlope"]), float(row["RescaleIntercept"]), spacing)
    sizes = zip(raw.shape[-1:] + raw.shape[:2], spacing, TARGET_SPACING_MM, strict=True)
    assert found.shape == tuple(math.floor(size * old / new) for size, old, new in sizes)
    target = data / "valid_preprocessed" / "valid_1" / "valid_1a" / f"{NAME}.npz"
    target.parent.mkdir(parents=True)
    np.savez(target, found)
    source.unlink()
    return found, target


def test_preprocessed_volumes_are_found_and_seen_as_the_originals(tmp_path: Path) -> None:
    write_ct_rate(tmp_path, train=1, valid=1, size=32, seed=0)
    cfg = config(folder.BENCHMARK, data_root=str(tmp_path), axis_order="zxy", protocol="reference", num_workers=0)
    case = folder.BENCHMARK.splits(cfg).test[0]
    wanted = folder.load(case, cfg)
    array, target = preprocess(tmp_path)
    assert array.dtype == np.float32 and -1 <= array.min() < -0.9 and 0.1 < array.max() <= 1
    folder._listed.cache_clear()
    folder._by_id.cache_clear()
    (found,) = (case for case in folder.BENCHMARK.splits(cfg).test if case.id == NAME)
    assert found.image == target
    assert np.abs(folder.load(found, cfg) - wanted).max() < 0.02
    task = VocabularyTask(outputs=CT_RATE_LABELS, kind="binary", load=folder.load, size_dhw=(128, 96, 128))
    item = FeatureDataset((found,), task, cfg, train=False)[0].image  # type: ignore[union-attr]
    assert item.shape == (1, 128, 128, 96) and 0 <= item.min() and item.max() <= 1
    np.testing.assert_array_equal(item[0].numpy(), folder.load(found, cfg).transpose(0, 2, 1))
