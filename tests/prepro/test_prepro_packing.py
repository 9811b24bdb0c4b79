"""From a download to arrows: rows, manifests, determinism, exclusions, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from prepro_builders import (
    FINDINGS,
    IMPRESSION,
    SMALL,
    KilledReader,
    chest,
    ct_rate_tree,
    ctrg_tree,
    save_nifti,
    slices_of,
)
from real_ct import lay_out_real_ct, write_table

from mg3d.datasets.arrow_schema import check_schema, row_checksum
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.datasets.volume import ctrg_stack
from mg3d.errors import DataError, EnvironmentProblem
from mg3d.scans.geometry import Geometry
from prepro.make_arrow import PackOptions, pack
from prepro.prepro_pretraining_data import main
from prepro.readers.base import Case
from prepro.readers.ctrg import CtrgReader

SIZE = ["--image-size", "8", "6", "8", "--target-spacing", "none"]


def _ct_rate(root: Path, out: Path, *more: str) -> int:
    return main(["ct_rate", "--root", str(root), "--out", str(out), *SIZE, "--workers", "1", *more])


def _ctrg(annotation: Path, out: Path, *more: str) -> int:
    root = str(annotation.parent)
    return main(["ctrg", "--root", root, "--annotation", str(annotation), "--out", str(out), *SIZE[:4], *more])


def _rows(path: Path) -> list[dict[str, Any]]:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        assert check_schema(reader.schema, path=str(path)) == "mg3d"
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        assert all(batch.num_rows == 1 for batch in batches)
        return [batch.to_pylist()[0] for batch in batches]


def _manifest(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.manifest.json").read_text())


def _image(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["image"], row["image_dtype"]).reshape(row["image_shape"])


def test_ct_rate_rows_hold_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=4, valid=2, offset=-1024)
    assert _ct_rate(root, tmp_path / "out") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["rows"] == {"train": 3, "val": 1, "test": 2}
    rows = _rows(tmp_path / "out" / "clm_ct_rate_train.arrow")
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
    hu = _image(row)
    assert hu.dtype == np.int16
    assert (hu.min(), hu.max()) > (-1001, 0)
    assert 0 < np.mean(hu > -100) < 1
    stored = np.array([20, 26, 30]) * [3.0, 2.5, 2.0] * np.array([17 / 20, 17 / 26, 26 / 30]) / [8, 6, 8]
    np.testing.assert_allclose(row["spacing_mm"], stored, rtol=1e-6)


def test_the_training_reader_accepts_every_row(tmp_path: Path) -> None:
    _ct_rate(ct_rate_tree(tmp_path / "raw"), tmp_path / "out")
    _ctrg(ctrg_tree(tmp_path / "ctrg"), tmp_path / "out")
    for corpus, dtype in (("clm_ct_rate", np.int16), ("clm_chest_ctrg", np.uint8)):
        table = ArrowTable([tmp_path / "out" / f"{corpus}_{split}.arrow" for split in ("train", "val", "test")])
        rows = [table.row(index) for index in range(len(table))]
        assert {row["split"] for row in rows} == {"train", "val", "test"}
        assert {np.asarray(row["image"]).dtype for row in rows} == {np.dtype(dtype)}
        assert table.metadata["mg3d.axis_order"] == "DHW=LPS(z,y,x)"


def test_scans_that_kill_their_workers_leave_nothing_to_write(tmp_path: Path) -> None:
    case = Case("train_1_a_1", "train_1", "train", (tmp_path / "a.nii.gz",), FINDINGS, IMPRESSION, splits=("train",))
    with pytest.raises(DataError, match="the worker reading it was killed"):
        pack(KilledReader(), [case, case], [], PackOptions(tmp_path / "out", SMALL, workers=2))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_reading(tmp_path: Path) -> None:
    case = Case("a", "a", "train", (tmp_path / "a.nii.gz",), FINDINGS, IMPRESSION, splits=("train",))
    huge = Geometry(size=(100_000, 100_000, 100_000))
    with pytest.raises(EnvironmentProblem, match="GiB free"):
        pack(KilledReader(), [case], [], PackOptions(tmp_path / "out", huge))


def test_both_releases_and_all_orientations_give_the_same_rows(tmp_path: Path) -> None:
    for name, offset in (("first", -8192), ("second", 0)):
        _ct_rate(ct_rate_tree(tmp_path / name, offset=offset), tmp_path / f"{name}_out")
    turned = ct_rate_tree(tmp_path / "turned")
    for path in (turned / "dataset" / "train").rglob("train_1_a_1.nii.gz"):
        save_nifti(path, chest(1001), axes="ASR")
    _ct_rate(turned, tmp_path / "turned_out")
    first, second, third = (
        _manifest(tmp_path / f"{name}_out", "clm_ct_rate_train") for name in ("first", "second", "turned")
    )
    assert {row["rescale"] for row in first["cases"]} == {"applied"}
    assert {row["rescale"] for row in second["cases"]} == {"as_stored"}
    digests = [[row["image_sha256"] for row in manifest["cases"]] for manifest in (first, second, third)]
    assert digests[0] == digests[1] == digests[2]


def test_same_input_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=5, valid=3)
    _ct_rate(root, tmp_path / "one")
    _ct_rate(root, tmp_path / "again")
    _ct_rate(root, tmp_path / "two", "--workers", "2")
    for split in ("train", "val", "test"):
        name = f"clm_ct_rate_{split}"
        contents = {(tmp_path / out / f"{name}.arrow").read_bytes() for out in ("one", "again", "two")}
        assert len(contents) == 1
        assert _manifest(tmp_path / "one", name) == _manifest(tmp_path / "two", name)
        assert _manifest(tmp_path / "one", name)["sha256"] == hashlib.sha256(contents.pop()).hexdigest()


def test_seed_changes_the_validation_patients(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=8, valid=1)
    drawn = set()
    for seed in range(4):
        _ct_rate(root, tmp_path / str(seed), "--seed", str(seed))
        drawn.add(_rows(tmp_path / str(seed) / "clm_ct_rate_val.arrow")[0]["patient_id"])
    assert len(drawn) > 1


def test_reconstructions_share_one_report(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1, reconstructions=2)
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if "_a_2.nii" not in line) + "\n")
    assert _ct_rate(root, tmp_path / "out") == 0
    rows = _rows(tmp_path / "out" / "clm_ct_rate_train.arrow")
    assert len(rows) == 4
    assert rows[0]["caption"] == rows[1]["caption"]
    assert rows[0]["image"] != rows[1]["image"]


def test_exclusions_are_listed_with_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=6, valid=1)
    base = root / "dataset"
    table = base / "radiology_text_reports" / "train_reports.csv"
    lines = table.read_text().splitlines()
    text = f'"{FINDINGS} Case 3.",'
    assert text in lines[3]
    lines[2] = "train_2_a_1.nii.gz,,,Not given.,Not given."
    lines[3] = lines[3].replace(text, "NA,").replace(f'"{IMPRESSION}"', "")
    del lines[4]
    table.write_text("\n".join(lines) + "\n")
    save_nifti(base / "train" / "odd" / "holiday.nii.gz", chest())
    (base / "train" / "train_5" / "train_5_a" / "train_5_a_1.nii.gz").write_bytes(b"<html>")
    assert _ct_rate(root, tmp_path / "out", "--val-fraction", "0") == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["rows"]["train"], summary["excluded"], summary["failed"]) == (2, 4, 1)
    reasons = {
        item["image_id"]: item["reason"] for item in _manifest(tmp_path / "out", "clm_ct_rate_train")["exclusions"]
    }
    assert "fewer than 3 words" in reasons["train_2_a_1"]
    assert "fewer than 3 words" in reasons["train_3_a_1"]
    assert "no row" in reasons["train_4_a_1"]
    assert "NIfTI" in reasons["train_5_a_1"]
    assert "split_patient" in reasons["holiday"]


def test_empty_reports_can_be_kept_and_never_become_nan(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=1, valid=1)
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    header = table.read_text().splitlines()[0]
    table.write_text(f"{header}\ntrain_1_a_1.nii.gz,,,,\n")
    assert _ct_rate(root, tmp_path / "out", "--empty-report", "keep") == 0
    row = _rows(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]
    assert (row["caption"], row["findings"], row["findings_sen"]) == ([""], [""], [])


def test_labels_and_metadata_are_optional(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    (root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv").unlink()
    (root / "dataset" / "metadata" / "train_metadata.csv").unlink()
    validation = root / "dataset" / "multi_abnormality_labels" / "valid_predicted_labels.csv"
    write_table(validation, ("VolumeName", *CT_RATE_LABELS), [("valid_9_a_1.nii.gz", *[1] * 18)])
    assert _ct_rate(root / "dataset", tmp_path / "out") == 0
    assert _rows(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]["labels"] == []
    assert _rows(tmp_path / "out" / "clm_ct_rate_test.arrow")[0]["labels"] == [-1] * 18


def test_spacing_disagreement_is_a_recorded_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    path = root / "dataset" / "metadata" / "train_metadata.csv"
    path.write_text(path.read_text().replace("3.0", "1.0"))
    _ct_rate(root, tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["warned"] == 2
    assert "the header is used" in _manifest(tmp_path / "out", "clm_ct_rate_train")["cases"][0]["warnings"][0]


def test_nan_voxels_become_air_and_are_counted(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    for path in (root / "dataset" / "train").rglob("*.nii.gz"):
        volume = chest(int(path.name.split("_")[1])).astype(np.float32)
        volume[10, 10, 8:12] = np.nan
        save_nifti(path, volume)
    _ct_rate(root, tmp_path / "out")
    assert _manifest(tmp_path / "out", "clm_ct_rate_train")["cases"][0]["filled_voxels"] == 4


def test_equal_content_in_two_splits_stops_a_clean_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    for path in (root / "dataset").rglob("*.nii.gz"):
        save_nifti(path, chest(5))
    assert _ct_rate(root, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-2:]
    assert "equal content" in error[0]
    assert list((tmp_path / "out").iterdir()) == []
    assert _ct_rate(root, tmp_path / "out", "--split-protocol", "reference") == 0
    manifest = _manifest(tmp_path / "out", "clm_ct_rate_train")
    assert manifest["shared_between_splits"]["count"] == 1
    assert manifest["duplicates"] == [["train_1_a_1", "train_2_a_1"]]


def test_stop_at_the_first_bad_scan_leaves_the_old_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1)
    assert _ct_rate(root, tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad = root / "dataset" / "valid" / "valid_1" / "valid_1_a" / "valid_1_a_1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-30])
    capsys.readouterr()
    assert _ct_rate(root, tmp_path / "out", "--on-bad", "stop") == 2
    assert "valid_1_a_1" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_ctrg_slices_match_the_published_stack(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=10, test=3)
    assert _ctrg(annotation, tmp_path / "out") == 0
    counts = {s: len(_rows(tmp_path / "out" / f"clm_chest_ctrg_{s}.arrow")) for s in ("train", "val", "test")}
    assert counts == {"train": 9, "val": 1, "test": 3}
    rows = _rows(tmp_path / "out" / "clm_chest_ctrg_test.arrow")
    assert [row["image_id"] for row in rows] == ["10", "11", "12"]
    row = rows[0]
    wanted = ctrg_stack(list(slices_of(10)), (8, 6, 8), (21, 28))[:, 0] * 255
    np.testing.assert_array_equal(_image(row), np.rint(wanted).astype(np.uint8))
    assert row["labels"] == []
    assert row["image_dtype"] == "uint8"
    assert row["findings"] == [FINDINGS]


def test_golden_ctrg_stack_from_files(golden_dir: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(golden_dir / "image_ctrg.safetensors")
    files = []
    for number, coarse in enumerate(tensors["coarse_u8"]):
        grey = np.kron(coarse, np.ones((33, 33), np.uint8))[:512, :512]
        files.append(f"case/s{number}.png")
        (tmp_path / "case").mkdir(exist_ok=True)
        Image.fromarray(grey).save(tmp_path / files[-1])
    entry = {"id": "0", "report": FINDINGS, "result": IMPRESSION, "image_path": "case"}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    reader = CtrgReader(tmp_path, tmp_path / "a.json", Geometry())
    found = reader.find_cases()
    packed = reader.load(found.cases[0])
    wanted = tensors["unique_slices"][tensors["slice_map"]]
    assert np.abs(packed.voxels / np.float32(255) - wanted).max() <= 0.02


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_ctrg_folder_and_list_are_read_alike(tmp_path: Path, suffix: str) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=3, test=1, suffix=suffix)
    _ctrg(annotation, tmp_path / "listed")
    content = json.loads(annotation.read_text())
    for group in content.values():
        for entry in group:
            entry["image_path"] = str(Path(entry["image_path"][0]).parent)
    annotation.write_text(json.dumps(content))
    _ctrg(annotation, tmp_path / "folders")
    name = "clm_chest_ctrg_train.arrow"
    assert (tmp_path / "listed" / name).read_bytes() == (tmp_path / "folders" / name).read_bytes()


def test_ctrg_nifti_reverses_z_and_keeps_the_grey(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    stack = slices_of(1, count=24)
    entries = []
    for number in range(4):
        volume = np.roll(stack, number, axis=2).transpose(2, 1, 0)
        save_nifti(root / "nii" / f"{number}.nii.gz", volume.astype(np.int16))
        texts = {"report": FINDINGS, "result": IMPRESSION}
        entries.append({"id": f"{number}.nii.gz", "image_path": f"./nii/{number}.nii.gz", **texts})
    (root / "a.json").write_text(json.dumps({"train": entries[:3], "val": entries[3:], "test": entries[3:]}))
    assert _ctrg(root / "a.json", tmp_path / "out") == 0
    grey = _image(_rows(tmp_path / "out" / "clm_chest_ctrg_test.arrow")[0]).astype(float)
    assert grey.shape == (8, 6, 8)
    means = grey.mean(axis=(1, 2))
    assert (np.diff(means) < 0).all()
    kept = stack[1:22, 6:25, 2:30]  # the central 0.88, 0.65625 and 0.875 of 24 x 32 x 32
    assert means[0] == pytest.approx(kept[-1].mean(), abs=4)
    assert means[-1] == pytest.approx(kept[0].mean(), abs=4)


def test_ctrg_exclusions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=6, test=1)
    content = json.loads(annotation.read_text())
    train = content["train"]
    train[0]["report"] = "Too short"
    del train[1]["result"]
    train[2]["image_path"] = "../../../etc/passwd"
    train[3]["image_path"] = ["Chest/3/1.png", "Chest/3/none.png"]
    (annotation.parent / "Chest" / "4" / "10.png").write_bytes(b"not an image")
    annotation.write_text(json.dumps(content))
    assert _ctrg(annotation, tmp_path / "out", "--val-fraction", "0") == 1
    reasons = {i["image_id"]: i["reason"] for i in _manifest(tmp_path / "out", "clm_chest_ctrg_test")["exclusions"]}
    assert "fewer than 3 words" in reasons["0"]
    assert "'report' or 'result'" in reasons["1"]
    assert "leaves the data root" in reasons["2"]
    assert "not found" in reasons["3"]
    assert "decoded" in reasons["4"]


def test_path_out_of_the_root_is_refused_in_every_disguise(tmp_path: Path) -> None:
    from prepro.readers.tables import confined_path

    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    for path in ("../secret", "/etc/passwd", "a/../../secret", "link/x", f"{tmp_path}/root2", "a\0b"):
        with pytest.raises(DataError):
            confined_path(root, path)
    assert confined_path(root, "./a/../b.nii.gz") == root.resolve() / "b.nii.gz"


def test_rows_keep_their_order_and_numbers_sort_naturally(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=11, valid=1)
    _ct_rate(root, tmp_path / "out", "--val-fraction", "0")
    names = [row["image_id"] for row in _rows(tmp_path / "out" / "clm_ct_rate_train.arrow")]
    assert names == [f"train_{number}_a_1" for number in range(1, 12)]


def test_caption_without_separator_is_the_published_one(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    _ct_rate(root, tmp_path / "out", "--caption-separator", "none_reference")
    row = _rows(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]
    assert row["caption"][0] == row["findings"][0] + IMPRESSION


def test_small_geometry_is_what_the_schema_says(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    _ct_rate(root, tmp_path / "out")
    with pa.memory_map(str(tmp_path / "out" / "clm_ct_rate_train.arrow")) as source:
        metadata = pa.ipc.open_file(source).schema.metadata
    assert json.loads(metadata[b"mg3d.geometry"]) == SMALL.metadata()
    assert json.loads(metadata[b"mg3d.label_names"]) == list(CT_RATE_LABELS)


def test_real_ct_volumes_are_packed(shared_dir: Path, tmp_path: Path) -> None:
    volumes = ("lidc_0314_chest_2mm.nii.gz", "cip_ct-64-transformed.nrrd", "totalseg_abdomen_ct_3mm.nii.gz")
    root = lay_out_real_ct(shared_dir, tmp_path / "raw", volumes)
    out = tmp_path / "out"
    assert main(["ct_rate", "--root", str(root), "--out", str(out), "--workers", "1", "--val-fraction", "0"]) == 0
    rows = _rows(out / "clm_ct_rate_train.arrow")
    manifest = _manifest(out, "clm_ct_rate_train")
    rows += _rows(out / "clm_ct_rate_test.arrow")
    assert len(rows) == 3
    assert {row["rescale"] for row in manifest["cases"]} == {"as_stored"}
    assert [round(row["tilt_degrees"]) for row in manifest["cases"]] == [0, 20]
    for row in rows:
        hu = _image(row)
        assert hu.shape == (128, 96, 128)
        assert hu.min() >= -1000 and hu.max() <= 1000
        assert len(row["findings_sen"]) > 3
        assert len(row["labels"]) == 18
