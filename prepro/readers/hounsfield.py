"""What the readers of volumes in Hounsfield units share: the settings of the preparation, and how a case is loaded."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mg3d.datasets.arrow_schema import window_text
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.read import read_scan
from prepro.readers.base import Case, PackedImage


class HounsfieldReader:
    """Base of such readers; the subclass is a frozen dataclass that holds the attributes.

    Attributes:
        geometry: the grid to end on, and the window.
        rescale: ``auto``, ``apply`` or ``skip``, see :mod:`mg3d.scans.hounsfield`.
        orientation: ``canonical`` or ``snap``, see :func:`mg3d.scans.geometry.to_canonical`.
        max_volume_gib: largest volume to read.
        assumed_spacing_mm: (z, y, x) used only where neither header nor table has a voxel size.
        table_expected: every scan should have a row in a metadata table, see :func:`mg3d.scans.prepare.believed`.
        series: of a DICOM folder that holds several, see :func:`mg3d.scans.read.read_scan`.
    """

    geometry: Geometry
    rescale: str
    orientation: str
    max_volume_gib: float
    assumed_spacing_mm: tuple[float, float, float] | None
    table_expected: ClassVar[bool] = False
    series: str = ""

    @property
    def window(self) -> str:
        """Intensity window of the voxels, as in the schema metadata."""
        return window_text(self.geometry.window_hu)

    def load(self, case: Case) -> PackedImage:
        """Read, rescale, orient and resample one volume.

        Args:
            case: from ``find_cases``.

        Returns:
            int16 HU on the configured grid.

        Raises:
            DataError: the file is damaged or its values or geometry make no sense.
        """
        scan = prepare_scan(
            read_scan(case.source[0], self.max_volume_gib, self.series),
            self.geometry,
            rescale=self.rescale,
            table_rescale=case.rescale,
            table_spacing_mm=case.table_spacing_mm,
            table_shape=case.table_shape,
            table_expected=self.table_expected,
            assumed_spacing_mm=self.assumed_spacing_mm,
            orientation=self.orientation,
            dtype=np.int16,
        )
        return PackedImage(scan.voxels_hu, scan.spacing_mm, scan.record, scan.warnings)
