"""Rows of a metadata table against the header of their scan: which one counts, and when neither does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from prepro_builders import chest

from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.raw_volume import RawVolume

AS_STORED = Geometry(store="native", target_spacing_mm=None)
NAN = float("nan")
UNFILLED = RawVolume(chest(), np.eye(4), (1.0, 1.0, 1.0), 1.0, 0.0, True, path="a.nii")


def test_a_header_that_was_never_filled_in_counts_as_none_where_a_table_is_expected() -> None:
    for row in (None, (NAN, 8.0, 8.0), (3.0, NAN, NAN)):
        with pytest.raises(DataError, match="no voxel size in the header or the metadata table") as caught:
            prepare_scan(UNFILLED, AS_STORED, table_spacing_mm=row, table_expected=True)
        assert "never filled in" in caught.value.message and "--assume-spacing" in caught.value.remedy
        told = prepare_scan(
            UNFILLED, AS_STORED, table_spacing_mm=row, table_expected=True, assumed_spacing_mm=(3.0, 2.5, 2.0)
        )
        assert (told.spacing_mm, told.record["spacing"]) == ((3.0, 2.5, 2.0), "assumed")
    for expected in (True, False):
        table = prepare_scan(UNFILLED, AS_STORED, table_spacing_mm=(3.0, 2.5, 2.0), table_expected=expected)
        assert (table.spacing_mm, table.record["spacing"]) == ((3.0, 2.5, 2.0), "table")
        assert table.record["orientation"] == "assumed LPS"
        one = prepare_scan(UNFILLED, AS_STORED, table_spacing_mm=(1.0, 1.0, 1.0), table_expected=expected)
        assert (one.record["spacing"], one.warnings) == ("header", ())


def test_without_a_table_such_a_header_is_used_with_a_warning() -> None:
    scan = prepare_scan(UNFILLED, AS_STORED)
    assert scan.record["spacing"] == "header" and "never filled in" in scan.warnings[0]
    turned = replace(UNFILLED, affine=np.diag([0.9, 1.1, 1.0, 1.0]), spacing_mm=(0.9, 1.1, 1.0))
    assert prepare_scan(turned, AS_STORED, table_expected=True).warnings == ()


def test_a_row_that_is_not_that_of_the_file_is_named() -> None:
    raw = replace(UNFILLED, affine=np.diag([-2.0, -2.5, 3.0, 1.0]), spacing_mm=(2.0, 2.5, 3.0))
    counted = prepare_scan(raw, AS_STORED, table_spacing_mm=(3.0, 2.5, 2.0), table_shape=(20, 26, 30))
    assert counted.warnings == ()
    partly = prepare_scan(raw, AS_STORED, table_spacing_mm=(NAN, 8.0, 8.0))
    assert partly.warnings == ("metadata table says 8x8x? mm (x, y, z), the header is used",)
    assert prepare_scan(raw, AS_STORED, table_spacing_mm=(NAN, 2.5, 2.0)).warnings == ()
    fewer = prepare_scan(raw, AS_STORED, table_spacing_mm=(3.0, 2.5, 2.0), table_shape=(200, 26, 30))
    assert fewer.warnings == ("the metadata table counts 30 x 26 x 200 voxels, the file holds 30 x 26 x 20",)
    resampled = prepare_scan(raw, AS_STORED, table_spacing_mm=(1.5, 1.25, 1.0), table_shape=(40, 52, 60))
    assert resampled.warnings == ()
    with pytest.raises(DataError, match="counts 30 x 26 x 200 voxels"):
        prepare_scan(UNFILLED, AS_STORED, table_spacing_mm=(3.0, 2.5, 2.0), table_shape=(200, 26, 30))
