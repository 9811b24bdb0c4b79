"""CTRG downloads: slices, volumes, and entries that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from packing import image_of, manifest_of, pack_ctrg, rows_of
from PIL import Image
from prepro_builders import (
    FINDINGS,
    IMPRESSION,
    ctrg_tree,
    save_nifti,
    slices_of,
)

from mg3d.datasets.volume import ctrg_stack
from mg3d.scans.geometry import Geometry
from prepro.readers.ctrg import CtrgReader


def test_ctrg_slices_match_the_published_stack(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=10, test=3)
    assert pack_ctrg(annotation, tmp_path / "out") == 0
    counts = {s: len(rows_of(tmp_path / "out" / f"clm_chest_ctrg_{s}.arrow")) for s in ("train", "val", "test")}
    assert counts == {"train": 9, "val": 1, "test": 3}
    rows = rows_of(tmp_path / "out" / "clm_chest_ctrg_test.arrow")
    assert [row["image_id"] for row in rows] == ["10", "11", "12"]
    row = rows[0]
    wanted = ctrg_stack(list(slices_of(10)), (8, 6, 8), (21, 28))[:, 0] * 255
    np.testing.assert_array_equal(image_of(row), np.rint(wanted).astype(np.uint8))
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
    pack_ctrg(annotation, tmp_path / "listed")
    content = json.loads(annotation.read_text(encoding="utf-8"))
    for group in content.values():
        for entry in group:
            entry["image_path"] = str(Path(entry["image_path"][0]).parent)
    annotation.write_text(json.dumps(content))
    pack_ctrg(annotation, tmp_path / "folders")
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
    assert pack_ctrg(root / "a.json", tmp_path / "out") == 0
    grey = image_of(rows_of(tmp_path / "out" / "clm_chest_ctrg_test.arrow")[0]).astype(float)
    assert grey.shape == (8, 6, 8)
    means = grey.mean(axis=(1, 2))
    assert (np.diff(means) < 0).all()
    kept = stack[1:22, 6:25, 2:30]  # the central 0.88, 0.65625 and 0.875 of 24 x 32 x 32
    assert means[0] == pytest.approx(kept[-1].mean(), abs=4)
    assert means[-1] == pytest.approx(kept[0].mean(), abs=4)


def test_ctrg_exclusions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=6, test=1)
    content = json.loads(annotation.read_text(encoding="utf-8"))
    train = content["train"]
    train[0]["report"] = "Too short"
    del train[1]["result"]
    train[2]["image_path"] = "../../../etc/passwd"
    train[3]["image_path"] = ["Chest/3/1.png", "Chest/3/none.png"]
    (annotation.parent / "Chest" / "4" / "10.png").write_bytes(b"not an image")
    annotation.write_text(json.dumps(content))
    assert pack_ctrg(annotation, tmp_path / "out", "--val-fraction", "0") == 1
    reasons = {i["image_id"]: i["reason"] for i in manifest_of(tmp_path / "out", "clm_chest_ctrg")["exclusions"]}
    assert "fewer than 3 words" in reasons["0"]
    assert "'report' or 'result'" in reasons["1"]
    assert "leaves the data root" in reasons["2"]
    assert "not found" in reasons["3"]
    assert "decoded" in reasons["4"]
