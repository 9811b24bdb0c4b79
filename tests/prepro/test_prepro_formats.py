"""The published readers take every volume format of their data set and record what they read."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from prepro_builders import SMALL, chest, ct_rate_tree, ctrg_tree

from mg3d.datasets.volume import ct_rate_offline_resample
from mg3d.errors import DataError
from mg3d.scans.byte_stream import digest_of_files
from mg3d.scans.geometry import Geometry
from prepro.readers.ct_rate import CtRateReader
from prepro.readers.ctrg import CtrgReader

CROP = Geometry(size=(12, 10, 11))


def _preprocessed(root: Path, name: str, seed: int) -> Path:
    """Write the published npz of one scan in its published folder."""
    split, patient, scan, _ = name.split("_")
    folder = root / "dataset" / f"{split}_preprocessed" / f"{split}_{patient}" / f"{split}_{patient}{scan}"
    folder.mkdir(parents=True)
    np.savez(folder / f"{name}.nii.gz", ct_rate_offline_resample(chest(seed), 1.0, 0.0, (3.0, 2.5, 2.0)))
    return folder / f"{name}.nii.gz.npz"


def test_ct_rate_takes_npz_where_there_is_no_nifti(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=3, valid=1, offset=-1024)
    reader = CtRateReader(root, CROP)
    wanted = {case.image_id: reader.load(case) for case in reader.find_cases().cases}
    nifti = root / "dataset" / "train" / "train_2" / "train_2_a" / "train_2_a_1.nii.gz"
    npz = [_preprocessed(root, f"train_{number}_a_1", 1000 + number) for number in (1, 2)]
    nifti.unlink()
    cases = {case.image_id: case for case in reader.find_cases().cases}
    assert cases.keys() == wanted.keys()
    assert cases["train_1_a_1"].source[0].name == "train_1_a_1.nii.gz"
    assert cases["train_2_a_1"].source == (npz[1],)
    found = reader.load(cases["train_2_a_1"])
    assert np.abs(found.voxels - wanted["train_2_a_1"].voxels).max() <= 1
    np.testing.assert_allclose(found.spacing_mm, wanted["train_2_a_1"].spacing_mm, rtol=0.03)
    assert found.record["rescale"] == "as_stored"
    assert found.record["source_sha256"] == hashlib.sha256(npz[1].read_bytes()).hexdigest()


def test_ct_rate_without_any_spacing_needs_it_told(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=1, valid=1)
    for table in (root / "dataset" / "metadata").iterdir():
        table.unlink()
    for path in root.rglob("*.nii.gz"):
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[80:92], content[252:256] = bytes(12), bytes(4)
        path.write_bytes(gzip.compress(bytes(content)))
    case = CtRateReader(root, SMALL).find_cases().cases[0]
    with pytest.raises(DataError, match="no voxel size"):
        CtRateReader(root, SMALL).load(case)
    told = CtRateReader(root, SMALL, assumed_spacing_mm=(3.0, 2.5, 2.0)).load(case)
    assert told.record["spacing"] == "assumed"
    assert told.record["stored_spacing_mm"] == [3.0, 2.5, 2.0]


def test_ctrg_records_the_digest_of_all_slices(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path, train=2, test=1)
    reader = CtrgReader(tmp_path, annotation, SMALL)
    cases = reader.find_cases().cases
    digests = [reader.load(case).record["source_sha256"] for case in cases]
    files = [[hashlib.sha256(path.read_bytes()).hexdigest() for path in case.source] for case in cases]
    assert digests == [digest_of_files(names) for names in files]
    assert len(set(digests)) == len(cases)
    # the last slice lies outside the published depth range: its pixels are never used, its digest counts
    cases[0].source[-1].write_bytes(cases[0].source[3].read_bytes())
    assert reader.load(cases[0]).record["source_sha256"] != digests[0]


def test_ctrg_spacing_can_be_told(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path, train=1, test=1)
    usual, told = (
        CtrgReader(tmp_path, annotation, SMALL, assumed_spacing_mm=spacing) for spacing in (None, (3.0, 0.75, 0.75))
    )
    case = usual.find_cases().cases[0]
    assert told.load(case).spacing_mm[0] == pytest.approx(2 * usual.load(case).spacing_mm[0])
