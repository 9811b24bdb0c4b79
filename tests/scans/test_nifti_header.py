"""Every field of a NIfTI header at its worst: a volume or one clear refusal; contradictions by one stated rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepro_builders import chest

from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from mg3d.scans.nifti import read_nifti
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.raw_volume import RawVolume

LPS = np.diag([-2.0, -2.5, 3.0, 1.0])
KINDS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
FIELDS = [(size, name) for size, kind in KINDS.items() for name in kind.template_dtype.names]
EXTREMES = (0, 1, -1, 2, 5, 8, 255, 9999, 1e6, 1e30, -1e30, 1e-30, 0.5, -0.5, np.nan, np.inf, -np.inf)
SMALL = Geometry(size=(8, 6, 8), target_spacing_mm=None)


def written(path: Path, edit: Callable[[Any], None], qform: Any = LPS, sform: Any = LPS, size: int = 348) -> Path:
    """Save a chest whose header was edited without any of nibabel's checks; a form that is None has code 0."""
    image = (nib.Nifti1Image if size == 348 else nib.Nifti2Image)(chest(), LPS)
    content = bytearray(image.to_bytes())
    header = KINDS[size](bytes(content[:size]), check=False)
    header.set_qform(LPS if qform is None else qform, 0 if qform is None else 1)
    header.set_sform(sform, 0 if sform is None else 1)
    edit(header)
    content[:size] = KINDS[size](header.binaryblock, check=False, endianness="<").binaryblock
    path.write_bytes(bytes(content))
    return path


def field(name: str, value: Any) -> Callable[[Any], None]:
    return lambda header: header._structarr.__setitem__(name, value)


def volume_or_refusal(path: Path) -> RawVolume | DataError:
    try:
        raw = read_nifti(path)
        prepare_scan(raw, SMALL, rescale="skip", assumed_spacing_mm=(3.0, 2.5, 2.0))
    except DataError as problem:
        assert problem.path == str(path) and problem.remedy and "\n" not in problem.message
        return problem
    assert np.isfinite(raw.affine).all()
    return raw


def extremes_of(kind: np.dtype[Any]) -> list[Any]:
    if kind.kind == "S":
        return [b"", b"0", b"ni1", b"n+2", b"\xff" * kind.itemsize]
    if kind.kind == "f":
        return [*EXTREMES, np.finfo(kind).max, np.finfo(kind).min]
    limits = np.iinfo(kind)
    whole = {int(value) for value in EXTREMES if np.isfinite(value)} | {int(limits.max), int(limits.min)}
    return sorted(value for value in whole if limits.min <= value <= limits.max)


@pytest.mark.parametrize(("size", "name"), FIELDS, ids=[f"nifti{1 + (size > 348)}-{name}" for size, name in FIELDS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_value_of_any_field_gives_a_volume_or_a_refusal(tmp_path: Path, size: int, name: str) -> None:
    kind = KINDS[size].template_dtype[name]
    base, shape = kind.subdtype or (kind, ())
    for value in extremes_of(base):
        for place in np.ndindex(*shape):
            for forms in ({"sform": None}, {"qform": None}):

                def edit(header: Any, value: Any = value, place: Any = place) -> None:
                    stored = header._structarr
                    if shape:
                        stored[name][place] = value
                    else:
                        stored[name] = value

                volume_or_refusal(written(tmp_path / "a.nii", edit, size=size, **forms))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_damaged_bytes_of_the_header_give_a_volume_or_a_refusal(
    tmp_path: Path, damage: list[tuple[int, int]]
) -> None:
    content = bytearray(written(tmp_path / "a.nii", lambda header: None).read_bytes())
    for place, value in damage:
        content[place] = value
    (tmp_path / "a.nii").write_bytes(bytes(content))
    volume_or_refusal(tmp_path / "a.nii")


REFUSED: dict[str, tuple[Callable[[Any], None], dict[str, Any], str]] = {
    "quaternion too long": (
        lambda h: [field(f"quatern_{part}", 1)(h) for part in "bcd"],  # type: ignore[func-returns-value]
        {"sform": None},
        "quaternion (1, 1, 1)",
    ),
    "quaternion NaN": (field("quatern_b", np.nan), {"sform": None}, "quaternion"),
    "unknown voxel type": (field("datatype", 9999), {}, "9999"),
    "colour": (field("datatype", 128), {}, "real number"),
    "complex": (field("datatype", 32), {}, "real number"),
    "no axes": (field("dim", (0, 30, 26, 20, 1, 1, 1, 1)), {}, "dim[0] is 0"),
    "eight axes": (field("dim", (8, 30, 26, 20, 1, 1, 1, 1)), {}, "dim[0] is 8"),
    "a negative axis": (field("dim", (3, -30, 26, 20, 1, 1, 1, 1)), {}, "-30"),
    "offset inside the header": (field("vox_offset", 348), {}, "voxel offset"),
    "offset between bytes": (field("vox_offset", 352.5), {}, "voxel offset"),
    "offset beyond the file": (field("vox_offset", 1e6), {}, "holds 0 of"),
    "magic of a pair": (field("magic", b"ni1"), {}, "single-file"),
    "slope infinite": (field("scl_slope", np.inf), {}, "scl_slope inf"),
    "intercept NaN": (lambda h: [field("scl_slope", 2)(h), field("scl_inter", np.nan)(h)], {}, "scl_inter nan"),
    "qform code": (field("qform_code", 77), {}, "qform_code 77"),
    "sform code": (field("sform_code", -1), {}, "sform_code -1"),
    "mirrored or not": (field("pixdim", (-0.5, 2, 2.5, 3, 1, 1, 1, 1)), {"sform": None}, "qfac"),
    "forms of another side": (lambda h: None, {"sform": np.diag([2.0, -2.5, 3.0, 1.0])}, "180 degrees apart"),
    "forms of another order": (lambda h: None, {"sform": LPS[[1, 0, 2, 3]]}, "90 degrees apart"),
    "sheared too much": (lambda h: None, {"qform": None, "sform": LPS + 4 * np.eye(4)[:, [3, 3, 0, 3]]}, "sheared"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    edit, forms, words = REFUSED[case]
    problem = volume_or_refusal(written(tmp_path / "a.nii", edit, **forms))
    assert isinstance(problem, DataError) and words in problem.message


def turned(degrees: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(4)
    matrix[:2, :2] = [[cosine, -sine], [sine, cosine]]
    return matrix @ LPS


METRES, MICROMETRES = np.diag([1e-3, 1e-3, 1e-3, 1.0]), np.diag([1e3, 1e3, 1e3, 1.0])
SHEARED = LPS.copy()
SHEARED[0, 2] = 1.0
SETTLED: dict[str, tuple[Callable[[Any], None], dict[str, Any], tuple[float, float, float], str]] = {
    "pixdim differs": (
        field("pixdim", (1, 1, 1, 1, 1, 1, 1, 1)),
        {"qform": None},
        (2.0, 2.5, 3.0),
        "pixdim says 1 x 1 x 1, the sform 2 x 2.5 x 3:",
    ),
    "qform turned": (lambda h: None, {"qform": turned(3)}, (2.0, 2.5, 3.0), "3.0 degrees apart"),
    "qform unreadable": (field("quatern_b", 3), {}, (2.0, 2.5, 3.0), "qform cannot be read"),
    "gantry tilt": (
        lambda h: None,
        {"qform": None, "sform": SHEARED},
        (2.0, 2.5, 3.16227766),
        "sheared by 18.4 degrees",
    ),
    "metres": (field("xyzt_units", 1), {"qform": METRES @ LPS, "sform": METRES @ LPS}, (2.0, 2.5, 3.0), "from metres"),
    "metres, qform": (field("xyzt_units", 1), {"qform": METRES @ LPS, "sform": None}, (2.0, 2.5, 3.0), "from metres"),
    "micrometres": (
        field("xyzt_units", 3),
        {"qform": None, "sform": MICROMETRES @ LPS},
        (2.0, 2.5, 3.0),
        "from micrometres",
    ),
    "metres that are none": (field("xyzt_units", 1), {}, (2.0, 2.5, 3.0), "taken as millimetres"),
    "unknown unit": (field("xyzt_units", 7), {}, (2.0, 2.5, 3.0), "no unit of length"),
    "qfac 0": (field("pixdim", (0, 2, 2.5, 3, 1, 1, 1, 1)), {"sform": None}, (2.0, 2.5, 3.0), "qfac"),
    "qfac 2": (field("pixdim", (2, 2, 2.5, 3, 1, 1, 1, 1)), {"sform": None}, (2.0, 2.5, 3.0), "qfac"),
    "qfac NaN": (field("pixdim", (np.nan, 2, 2.5, 3, 1, 1, 1, 1)), {"sform": None}, (2.0, 2.5, 3.0), "qfac"),
}


@pytest.mark.parametrize("case", SETTLED)
def test_a_contradiction_is_settled_with_a_warning_that_stays_with_the_volume(tmp_path: Path, case: str) -> None:
    edit, forms, spacing_mm, words = SETTLED[case]
    raw = volume_or_refusal(written(tmp_path / "a.nii", edit, **forms))
    assert isinstance(raw, RawVolume)
    assert raw.spacing_mm == pytest.approx(spacing_mm, rel=1e-6)
    assert len([warning for warning in raw.warnings if words in warning]) == 1
    np.testing.assert_allclose(np.linalg.norm(raw.affine[:3, :3], axis=0), spacing_mm, rtol=1e-6)
    scan = prepare_scan(raw, SMALL, rescale="skip")
    assert set(raw.warnings) <= set(scan.warnings)


@pytest.mark.parametrize("units", [0, 2, 10, 18])
def test_a_sound_header_gives_no_warning_and_nibabels_affine(tmp_path: Path, units: int) -> None:
    for forms in ({}, {"qform": None}, {"sform": None}, {"qform": turned(7), "sform": turned(7)}):
        path = written(tmp_path / "a.nii", field("xyzt_units", units), **forms)
        raw = read_nifti(path)
        assert raw.warnings == ()
        np.testing.assert_array_equal(raw.affine, nib.load(path).affine)


def test_a_qform_with_qfac_zero_is_read_like_one(tmp_path: Path) -> None:
    """Seen in public lung CTs; nibabel and SimpleITK read it so."""
    path = written(tmp_path / "a.nii", field("pixdim", (0, 2, 2.5, 3, 1, 1, 1, 1)), sform=None)
    np.testing.assert_allclose(read_nifti(path).affine, LPS, atol=1e-6)


def test_a_quaternion_rounded_to_a_little_more_than_one_is_read(tmp_path: Path) -> None:
    def rounded(header: Any) -> None:
        for part, value in zip("bcd", (0.70711, 0.70711, 0.0), strict=True):
            field(f"quatern_{part}", value)(header)

    raw = read_nifti(written(tmp_path / "a.nii", rounded, sform=None))
    np.testing.assert_allclose(np.abs(raw.affine[:3, :3]), [[0, 2.5, 0], [2, 0, 0], [0, 0, 3]], atol=1e-5)


def test_extensions_are_left_out_unread(tmp_path: Path) -> None:
    """An extension that claims no or a negative length sends other readers through the whole file."""
    content = written(tmp_path / "a.nii", field("vox_offset", 384)).read_bytes()
    for claimed in (0, -16, 2**31 - 1):
        extension = bytes([1, 0, 0, 0]) + claimed.to_bytes(4, "little", signed=True) + bytes(28)
        (tmp_path / "a.nii").write_bytes(content[:348] + extension + content[352:])
        np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii").voxels_xyz, chest())
