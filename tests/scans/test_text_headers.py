"""Geometry of NRRD and MetaImage headers: contradictions, units and sizes that are none, by the rule of NIfTI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prepro_builders import chest

from mg3d.errors import DataError
from mg3d.scans.raw_volume import RawVolume
from mg3d.scans.read import read_scan

VOXELS = chest().tobytes(order="F")
NRRD = "NRRD0005\ntype: short\ndimension: 3\nsizes: 30 26 20\nencoding: raw\nendian: little\n{fields}\n\n"
META = "NDims = 3\nDimSize = 30 26 20\n{fields}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
LPS = "space: left-posterior-superior\n"
AXIAL = "space directions: (2,0,0) (0,2.5,0) (0,0,3)"
SIZES = "ElementSpacing = 2 2.5 3"


def read(folder: Path, kind: str, fields: str) -> RawVolume:
    path = folder / f"a.{kind}"
    header = {"nrrd": NRRD, "mha": META}[kind].format(fields=fields.strip("\n"))
    path.write_bytes(header.encode("utf-8") + VOXELS)
    return read_scan(path)


REFUSED = [
    ("nrrd", "spacings: 2 nan 3"),
    ("nrrd", "spacings: -2 2.5 3"),
    ("nrrd", "spacings: 0 2.5 3"),
    ("nrrd", "spacings: 0.01 2.5 3"),
    ("nrrd", "spacings: 50 2.5 3"),
    ("nrrd", LPS + "space directions: none (0,2.5,0) (0,0,3)"),
    ("nrrd", LPS + AXIAL + "\nspacings: 1 1 1"),
    ("nrrd", AXIAL),
    ("nrrd", LPS + "space directions: (2,0,0) (2,0.5,0) (0,0,3)"),
    ("nrrd", LPS + "space directions: (2,0,0) (2,0,0) (0,0,3)"),
    ("mha", "ElementSpacing = 2 nan 3"),
    ("mha", "ElementSpacing = -2 2.5 3"),
    ("mha", "ElementSpacing = 0.01 2.5 3"),
    ("mha", "ElementSpacing = 2 2.5 50"),
    ("mha", SIZES + "\nTransformMatrix = 2 0 0 0 1 0 0 0 1"),
    ("mha", SIZES + "\nTransformMatrix = 1 0 0 0 1 0 0 0 0"),
    ("mha", SIZES + "\nTransformMatrix = 1 0 0 0.8 0.6 0 0 0 1"),
    ("mha", SIZES + "\nTransformMatrix = nan 0 0 0 1 0 0 0 1"),
]


@pytest.mark.parametrize(("kind", "fields"), REFUSED)
def test_an_impossible_geometry_is_refused(tmp_path: Path, kind: str, fields: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, kind, fields)
    assert caught.value.path == str(tmp_path / f"a.{kind}") and caught.value.remedy


SETTLED = [
    ("nrrd", "space: scanner-xyz\n" + AXIAL, "not the patient's"),
    ("nrrd", "space dimension: 3\n" + AXIAL, "not the patient's"),
    ("nrrd", LPS + 'space units: "m" "m" "m"\nspace directions: (.002,0,0) (0,.0025,0) (0,0,.003)', "from metres"),
    ("nrrd", LPS + 'space units: "um" "um" "um"\nspace directions: (2e3,0,0) (0,2500,0) (0,0,3e3)', "micrometres"),
    ("nrrd", LPS + 'space units: "m" "m" "m"\n' + AXIAL, "taken as millimetres"),
    ("nrrd", 'spacings: 2 2.5 3\nunits: "m" "m" "m"', "taken as millimetres"),
    ("mha", "DistanceUnits = m\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nElementSpacing = .002 .0025 .003", "from metres"),
    ("mha", "DistanceUnits = m\n" + SIZES, "taken as millimetres"),
    ("mha", SIZES + "\nTransformMatrix = 1 0 0 0 1 0 0 0.1736 0.9848", "sheared by 10.0 degrees"),
]


@pytest.mark.parametrize(("kind", "fields", "words"), SETTLED)
def test_a_contradiction_is_settled_with_a_warning(tmp_path: Path, kind: str, fields: str, words: str) -> None:
    raw = read(tmp_path, kind, fields)
    assert raw.spacing_mm == pytest.approx((2.0, 2.5, 3.0))
    assert len(raw.warnings) == 1 and words in raw.warnings[0]
    if raw.oriented:
        np.testing.assert_allclose(np.linalg.norm(raw.affine[:3, :3], axis=0), raw.spacing_mm, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("nrrd", LPS + AXIAL),
        ("nrrd", LPS + 'space units: "mm" "mm" "mm"\n' + AXIAL),
        ("nrrd", "spacings: 2 2.5 3"),
        ("mha", SIZES),
        ("mha", SIZES + "\nElementSize = 1 1 1\nDistanceUnits = mm\nTransformMatrix = 1 0 0 0 1 0 0 0 1"),
    ],
)
def test_a_sound_header_gives_no_warning(tmp_path: Path, kind: str, fields: str) -> None:
    raw = read(tmp_path, kind, fields)
    assert (raw.spacing_mm, raw.warnings) == ((2.0, 2.5, 3.0), ())
