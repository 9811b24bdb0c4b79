"""From a CT-RATE download to arrows: rows, manifests, determinism."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from packing import image_of, manifest_of, pack_ct_rate, pack_ctrg, rows_of
from prepro_builders import (
    FINDINGS,
    IMPRESSION,
    SMALL,
    chest,
    ct_rate_tree,
    ctrg_tree,
    save_nifti,
)
from real_ct import lay_out_real_ct, write_table

from mg3d.datasets.arrow_schema import row_checksum
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.labels import CT_RATE_LABELS
from prepro.prepro_pretraining_data import main


@pytest.mark.smoke
def test_ct_rate_rows_hold_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=4, valid=2, offset=-1024)
    assert pack_ct_rate(root, tmp_path / "out") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["rows"] == {"train": 3, "val": 1, "test": 2}
    rows = rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")
    row = rows[0]
    name = row["image_id"]
    assert row["patient_id"] == name.rsplit("_", 2)[0]
    assert row["corpus"] == "clm_ct_rate"
    assert row["findings"] == [f"{FINDINGS} Case {name.split('_')[1]}."]
    assert row["impression"] == [IMPRESSION]
    assert row["caption"] == [f"{row['findings'][0]} {IMPRESSION}"]
    assert row["impression_sen"] == ["Normal thorax CT, ", "no nodule."]
    assert row["findings_sen"][:2] == ["Trachea, ", "both main bronchi are open. "]
    assert row["labels"] == [number % 2 for number in range(18)]
    assert row["image_shape"] == [8, 6, 8]
    assert row["image_crc32"] == zlib.crc32(row["image"])
    assert row["row_crc32"] == row_checksum(row["image"], row)
    hu = image_of(row)
    assert hu.dtype == np.int16
    assert (hu.min(), hu.max()) > (-1001, 0)
    assert 0 < np.mean(hu > -100) < 1
    stored = np.array([20, 26, 30]) * [3.0, 2.5, 2.0] * np.array([17 / 20, 17 / 26, 26 / 30]) / [8, 6, 8]
    np.testing.assert_allclose(row["spacing_mm"], stored, rtol=1e-6)


def test_the_training_reader_accepts_every_row(tmp_path: Path) -> None:
    pack_ct_rate(ct_rate_tree(tmp_path / "raw"), tmp_path / "out")
    pack_ctrg(ctrg_tree(tmp_path / "ctrg"), tmp_path / "out")
    for corpus, dtype in (("clm_ct_rate", np.int16), ("clm_chest_ctrg", np.uint8)):
        table = ArrowTable([tmp_path / "out" / f"{corpus}_{split}.arrow" for split in ("train", "val", "test")])
        rows = [table.row(index) for index in range(len(table))]
        assert {row["split"] for row in rows} == {"train", "val", "test"}
        assert {np.asarray(row["image"]).dtype for row in rows} == {np.dtype(dtype)}
        assert table.metadata["mg3d.axis_order"] == "DHW=LPS(z,y,x)"


def test_both_releases_and_all_orientations_give_the_same_rows(tmp_path: Path) -> None:
    for name, offset in (("first", -8192), ("second", 0)):
        pack_ct_rate(ct_rate_tree(tmp_path / name, offset=offset), tmp_path / f"{name}_out")
    turned = ct_rate_tree(tmp_path / "turned")
    for path in (turned / "dataset" / "train").rglob("train_1_a_1.nii.gz"):
        save_nifti(path, chest(1001), axes="ASR")
    pack_ct_rate(turned, tmp_path / "turned_out")
    first, second, third = (
        manifest_of(tmp_path / f"{name}_out", "clm_ct_rate_train") for name in ("first", "second", "turned")
    )
    assert {row["rescale"] for row in first["cases"]} == {"applied"}
    assert {row["rescale"] for row in second["cases"]} == {"as_stored"}
    digests = [[row["image_sha256"] for row in manifest["cases"]] for manifest in (first, second, third)]
    assert digests[0] == digests[1] == digests[2]


def test_same_input_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=5, valid=3)
    pack_ct_rate(root, tmp_path / "one")
    pack_ct_rate(root, tmp_path / "again")
    pack_ct_rate(root, tmp_path / "two", "--workers", "2")
    for split in ("train", "val", "test"):
        name = f"clm_ct_rate_{split}"
        contents = {(tmp_path / out / f"{name}.arrow").read_bytes() for out in ("one", "again", "two")}
        assert len(contents) == 1
        assert manifest_of(tmp_path / "one", name) == manifest_of(tmp_path / "two", name)
        assert manifest_of(tmp_path / "one", name)["sha256"] == hashlib.sha256(contents.pop()).hexdigest()


def test_seed_changes_the_validation_patients(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=8, valid=1)
    drawn = set()
    for seed in range(4):
        pack_ct_rate(root, tmp_path / str(seed), "--seed", str(seed))
        drawn.add(rows_of(tmp_path / str(seed) / "clm_ct_rate_val.arrow")[0]["patient_id"])
    assert len(drawn) > 1


def test_reconstructions_share_one_report(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1, reconstructions=2)
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(line for line in lines if "_a_2.nii" not in line) + "\n")
    assert pack_ct_rate(root, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")
    assert len(rows) == 4
    assert rows[0]["caption"] == rows[1]["caption"]
    assert rows[0]["image"] != rows[1]["image"]


def test_empty_reports_can_be_kept_and_never_become_nan(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=1, valid=1)
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    header = table.read_text(encoding="utf-8").splitlines()[0]
    table.write_text(f"{header}\ntrain_1_a_1.nii.gz,,,,\n")
    assert pack_ct_rate(root, tmp_path / "out", "--empty-report", "keep") == 0
    row = rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]
    assert (row["caption"], row["findings"], row["findings_sen"]) == ([""], [""], [])


def test_labels_and_metadata_are_optional(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    (root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv").unlink()
    (root / "dataset" / "metadata" / "train_metadata.csv").unlink()
    validation = root / "dataset" / "multi_abnormality_labels" / "valid_predicted_labels.csv"
    write_table(validation, ("VolumeName", *CT_RATE_LABELS), [("valid_9_a_1.nii.gz", *[1] * 18)])
    assert pack_ct_rate(root / "dataset", tmp_path / "out") == 0
    assert rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]["labels"] == []
    assert rows_of(tmp_path / "out" / "clm_ct_rate_test.arrow")[0]["labels"] == [-1] * 18


def test_spacing_disagreement_is_a_recorded_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    path = root / "dataset" / "metadata" / "train_metadata.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("3.0", "1.0"))
    pack_ct_rate(root, tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["warned"] == 2
    assert "the header is used" in manifest_of(tmp_path / "out", "clm_ct_rate_train")["cases"][0]["warnings"][0]


def test_nan_voxels_become_air_and_are_counted(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    for path in (root / "dataset" / "train").rglob("*.nii.gz"):
        volume = chest(int(path.name.split("_")[1])).astype(np.float32)
        volume[10, 10, 8:12] = np.nan
        save_nifti(path, volume)
    pack_ct_rate(root, tmp_path / "out")
    assert manifest_of(tmp_path / "out", "clm_ct_rate_train")["cases"][0]["filled_voxels"] == 4


def test_rows_keep_their_order_and_numbers_sort_naturally(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=11, valid=1)
    pack_ct_rate(root, tmp_path / "out", "--val-fraction", "0")
    names = [row["image_id"] for row in rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")]
    assert names == [f"train_{number}_a_1" for number in range(1, 12)]


def test_caption_without_separator_is_the_published_one(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    pack_ct_rate(root, tmp_path / "out", "--caption-separator", "none_reference")
    row = rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]
    assert row["caption"][0] == row["findings"][0] + IMPRESSION


def test_small_geometry_is_what_the_schema_says(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    pack_ct_rate(root, tmp_path / "out")
    with pa.memory_map(str(tmp_path / "out" / "clm_ct_rate_train.arrow")) as source:
        metadata = pa.ipc.open_file(source).schema.metadata
    assert json.loads(metadata[b"mg3d.geometry"]) == SMALL.metadata()
    assert json.loads(metadata[b"mg3d.label_names"]) == list(CT_RATE_LABELS)


def test_volumes_of_many_geometries_are_packed(collection: Path, tmp_path: Path) -> None:
    volumes = ("lidc_0314_chest_2mm.nii.gz", "cip_ct-64-transformed.nrrd", "totalseg_abdomen_ct_3mm.nii.gz")
    root = lay_out_real_ct(collection, tmp_path / "raw", volumes)
    out = tmp_path / "out"
    assert main(["ct_rate", "--root", str(root), "--out", str(out), "--workers", "1", "--val-fraction", "0"]) == 0
    rows = rows_of(out / "clm_ct_rate_train.arrow")
    manifest = manifest_of(out, "clm_ct_rate_train")
    rows += rows_of(out / "clm_ct_rate_test.arrow")
    assert len(rows) == 3
    assert {row["rescale"] for row in manifest["cases"]} == {"as_stored"}
    assert [round(row["tilt_degrees"]) for row in manifest["cases"]] == [0, 20]
    for row in rows:
        hu = image_of(row)
        assert hu.shape == (128, 96, 128)
        assert hu.min() >= -1000 and hu.max() <= 1000
        assert len(row["findings_sen"]) > 3
        assert len(row["labels"]) == 18
