"""From a scan or an array to the volumes a model takes, rebuilt from what is stored beside the weights.

D, H, W volume axes (z, y, x in LPS order); V volumes of one scan. No torch is needed to prepare a scan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from mg3d.datasets.arrow_schema import AXIS_ORDER, WINDOW_GREY_TEXT
from mg3d.datasets.stored_geometry import published_geometry
from mg3d.datasets.volume import PRETRAIN_SIZE_DHW
from mg3d.errors import CheckpointError, DataError
from mg3d.inference.crops import MIN_OVERLAP, crop_starts, pad_to
from mg3d.inference.places import Place, find_weights
from mg3d.inference.scan_table import TableRow, read_scan_table, scan_name
from mg3d.models.bounds import PREPARATION, check_values, read_json_object
from mg3d.scans.geometry import WHOLE, Geometry, grid_spacing, plan_axes
from mg3d.scans.prepare import PreparedScan, prepare_scan
from mg3d.scans.raw_volume import UNKNOWN_DIRECTIONS, RawVolume, check_layout, check_spacing
from mg3d.scans.read import read_scan

Mode = Literal["resize", "crops"]
MODES = ("resize", "crops")
PREPROCESSOR_NAME = "preprocessor.json"

Triple = tuple[float, float, float]


@dataclass(frozen=True, repr=False)
class ProcessedScan:
    """One scan as the model takes it.

    Attributes:
        grid_dhw: float32 in [0, 1]; the volume itself, or the whole scan that the crops are cut from.
        size_dhw: voxels of each volume.
        starts: first voxels of the V volumes in the grid.
        spacing_mm: (z, y, x) of the voxels.
        mode: ``resize`` or ``crops``.
        record: what was decided on the way, plain values (see :func:`mg3d.scans.prepare.prepare_scan`).
        warnings: oddities a person should look at.
        source: the file, folder or ``array``.
    """

    grid_dhw: np.ndarray
    size_dhw: tuple[int, int, int]
    starts: tuple[tuple[int, int, int], ...]
    spacing_mm: Triple
    mode: str
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()
    source: str = "array"

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the V volumes [D, H, W], views of the grid."""
        for start in self.starts:
            yield self.grid_dhw[tuple(slice(a, a + n) for a, n in zip(start, self.size_dhw, strict=True))]

    @property
    def volumes(self) -> np.ndarray:
        """All volumes, float32 [V, 1, D, H, W] in [0, 1]."""
        return np.stack(list(self))[:, None]

    def __repr__(self) -> str:
        size = "x".join(str(edge) for edge in self.size_dhw)
        spacing = "x".join(f"{value:.3g}" for value in self.spacing_mm)
        stored = "x".join(str(edge) for edge in self.record.get("stored_shape_DHW", ()))
        extent = "x".join(f"{value:.3g}" for value in self.record.get("stored_spacing_mm", ()))
        return (
            f"ProcessedScan({len(self)} volume(s) DHW {size}, spacing {spacing} mm, {self.mode}, "
            f"from {stored} at {extent} mm)"
        )


@dataclass(frozen=True)
class Processor:
    """Prepares scans as the training data of the weights were prepared.

    Attributes:
        size_dhw: voxels of the model's input (D, H, W).
        target_spacing_mm: (z, y, x) of the intermediate resampling; None leaves it out.
        crop_fractions_dhw: central part that is kept per axis by ``resize``.
        window_hu: HU that become 0 and 1.
        rescale: ``auto`` looks at the voxels, ``apply`` and ``skip`` obey (:mod:`mg3d.scans.hounsfield`).
        assumed_spacing_mm: (z, y, x) for scans whose header has none.
        crop_spacing_mm: (z, y, x) of ``crops``; None takes what ``resize`` gives the same scan, as in training.
        overlap: least part of its length that a crop shares with the next one.
        max_volume_gib: refuse what claims more voxel data than this.
        series: of a DICOM folder that holds several: SeriesInstanceUID or ``largest``.
        table: scale and voxel size of scans by name, where the header is not enough, see
            :func:`mg3d.inference.scan_table.read_scan_table`.
    """

    size_dhw: tuple[int, int, int] = PRETRAIN_SIZE_DHW
    target_spacing_mm: Triple | None = (1.5, 0.75, 0.75)
    crop_fractions_dhw: Triple = WHOLE
    window_hu: tuple[int, int] = (-1000, 1000)
    rescale: str = "auto"
    assumed_spacing_mm: Triple | None = None
    crop_spacing_mm: Triple | None = None
    overlap: float = MIN_OVERLAP
    max_volume_gib: float = 4.0
    series: str = ""
    table: Mapping[str, TableRow] = field(default_factory=dict, repr=False)

    def __call__(
        self, scan: str | Path | np.ndarray | Any, spacing_mm: Sequence[float] | None = None, mode: Mode = "resize"
    ) -> ProcessedScan:
        """Prepare one scan.

        Args:
            scan: NIfTI, NRRD, MetaImage or published ``.npz`` file, DICOM folder or multi-frame file; or an array or
                tensor [D, H, W] in HU (z to superior, y to posterior, x to the patient's left).
            spacing_mm: voxel size (z, y, x) of an array.
            mode: ``resize`` gives one volume as in training (resample, centre crop, resize); ``crops`` covers the
                whole scan with overlapping volumes of the same size and voxel size.

        Raises:
            DataError: no volume, no or an impossible voxel size, or values that are no Hounsfield units.
        """
        if mode not in MODES:
            raise DataError(f"mode={mode!r} is not known", f"choose {' or '.join(MODES)}")
        row = None
        if isinstance(scan, (str, Path)):
            path = Path(scan).expanduser()
            if not path.exists():
                raise DataError("no such file or folder", "give the scan's path", path=str(path))
            raw, rescale = read_scan(path, self.max_volume_gib, self.series), self.rescale
            row = self.table.get(scan_name(path.name))
        else:
            raw, rescale = _array_as_scan(scan, spacing_mm, self.max_volume_gib), "skip"
        prepared = prepare_scan(
            raw,
            self.geometry,
            rescale=rescale,
            table_rescale=row.rescale if row else None,
            table_spacing_mm=row.spacing_mm if row else None,
            table_shape=row.shape if row else None,
            table_expected=bool(self.table) and not raw.hounsfield,
            assumed_spacing_mm=self.assumed_spacing_mm,
            grid=self._crop_grid if mode == "crops" else None,
        )
        return self._finish(prepared, mode, raw.path or "array")

    @property
    def geometry(self) -> Geometry:
        """The training grid."""
        return Geometry(
            size=self.size_dhw,
            target_spacing_mm=self.target_spacing_mm,
            crop_fractions=self.crop_fractions_dhw,
            window_hu=self.window_hu,
        )

    def describe(self) -> dict[str, Any]:
        """What decides about the numbers, as plain values."""
        names = ("size_dhw", "target_spacing_mm", "crop_fractions_dhw", "window_hu", "rescale", "assumed_spacing_mm")
        found = {name: getattr(self, name) for name in (*names, "crop_spacing_mm", "overlap")}
        if self.series:
            found["series"] = self.series
        return {"axis_order": AXIS_ORDER, **json.loads(json.dumps(found))}

    def _crop_grid(self, shape: Sequence[int], spacing_mm: Sequence[float]) -> Geometry:
        """Grid of the whole scan with the voxel size of the crops."""
        wanted = self.crop_spacing_mm or grid_spacing(plan_axes(shape, spacing_mm, self.geometry))
        edges = [max(round(n * s / want), 1) for n, s, want in zip(shape, spacing_mm, wanted, strict=True)]
        return replace(self.geometry, size=(edges[0], edges[1], edges[2]), crop_fractions=WHOLE)

    def _finish(self, prepared: PreparedScan, mode: str, source: str) -> ProcessedScan:
        low, high = self.window_hu
        unit_DHW = np.subtract(prepared.voxels_hu, np.float32(low), dtype=np.float32)
        unit_DHW /= np.float32(high - low)
        np.clip(unit_DHW, 0.0, 1.0, out=unit_DHW)
        starts = [(0, 0, 0)]
        if mode == "crops":
            unit_DHW = pad_to(unit_DHW, self.size_dhw)
            starts = crop_starts(unit_DHW.shape, self.size_dhw, self.overlap)
        return ProcessedScan(
            grid_dhw=unit_DHW,
            size_dhw=self.size_dhw,
            starts=tuple(starts),
            spacing_mm=prepared.spacing_mm,
            mode=mode,
            record={**prepared.record, "volumes": len(starts)},
            warnings=prepared.warnings,
            source=source,
        )


def load_processor(
    name_or_path: str | Path, *, metadata: str | Path | Sequence[str | Path] = (), **changes: Any
) -> Processor:
    """Rebuild the preparation of scans that weights were trained with.

    Args:
        name_or_path: as for :func:`mg3d.load_model`.
        metadata: CSV files with the scale of scans by name, see :mod:`mg3d.inference.scan_table`; the first release
            of CT-RATE needs its own.
        **changes: other values of :class:`Processor`'s fields, for example ``assumed_spacing_mm`` or ``series``.

    Returns:
        The processor; weights that record nothing (the published files) get the published geometry.

    Raises:
        CheckpointError: no such weights, or a description that cannot be read.
        DataError: a table that cannot be read.
    """
    tables = [metadata] if isinstance(metadata, (str, Path)) else list(metadata)
    if tables:
        changes["table"] = read_scan_table(tables)
    return make_processor(stored_preparation(find_weights(name_or_path)), **changes)


def stored_preparation(place: Place) -> dict[str, Any]:
    """What weights record about the preparation of volumes; the published one where they record none."""
    if place.kind == "folder":
        return read_json_object(place.path / PREPROCESSOR_NAME)
    if place.kind == "architecture":
        return published_geometry()
    from mg3d.models.conversion import read_own_weights

    return read_own_weights(place.path, extra=published_geometry(), allow_partial=True).metadata


def make_processor(stored: Mapping[str, Any], **changes: Any) -> Processor:
    """Build a processor from ``preprocessor.json`` or the metadata of a checkpoint.

    Args:
        stored: ``size_dhw`` or ``input_size_dhw``, ``target_spacing_mm`` or ``spacing_mm``, ``crop_fractions_dhw``,
            ``window_hu``, ``axis_order``.
        **changes: other values of the processor's fields.

    Raises:
        CheckpointError: another axis order or orientation, values that are no geometry, or 8-bit grey without a window.
    """
    published = published_geometry()
    check_values(stored, PREPARATION, "the stored preparation is no geometry")
    if stored.get("axis_order", AXIS_ORDER) != AXIS_ORDER or stored.get("orientation", "LPS") != "LPS":
        raise CheckpointError(
            f"the weights want volumes as {stored.get('axis_order')} {stored.get('orientation', '')}".strip(),
            f"only {AXIS_ORDER} is prepared here",
        )
    window = changes.pop("window_hu", None) or stored.get("window_hu", published["window_hu"])
    if window == WINDOW_GREY_TEXT:
        raise CheckpointError(
            "the weights were trained on 8-bit grey pictures, whose window in HU is not recorded",
            "pass the window, for example load_processor(..., window_hu=(-1000, 1000))",
        )
    spacing = stored.get("target_spacing_mm", stored.get("spacing_mm", published["spacing_mm"]))
    size = stored.get("size_dhw") or stored.get("input_size_dhw") or PRETRAIN_SIZE_DHW
    fractions = stored.get("crop_fractions_dhw") or published["crop_fractions_dhw"]
    try:
        low, high = (int(limit) for limit in window)
        if low >= high:
            raise ValueError(f"the window {low} to {high} HU is empty")
        return Processor(
            size_dhw=cast("tuple[int, int, int]", _triple(size, int)),
            target_spacing_mm=None if spacing is None else _triple(spacing, float),
            crop_fractions_dhw=_triple(fractions, float),
            window_hu=(low, high),
            **changes,
        )
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"the stored preparation is no geometry ({error})", "export the model again") from error


def _triple(values: Sequence[Any], kind: type) -> Triple:
    first, second, third = (kind(value) for value in values)
    if not min(first, second, third) > 0:
        raise ValueError(f"{list(values)} are not three positive numbers")
    return first, second, third


def _array_as_scan(array: Any, spacing_mm: Sequence[float] | None, max_volume_gib: float) -> RawVolume:
    if spacing_mm is None:
        raise DataError("an array has no voxel size", "give spacing_mm=(z, y, x)")
    if hasattr(array, "detach"):  # a torch tensor, without importing torch
        array = array.detach().cpu().numpy()
    values_DHW = np.asarray(array)
    check_layout(values_DHW.shape, values_DHW.dtype, None, max_volume_gib, "array")
    if len(spacing_mm) != 3:
        raise DataError(f"spacing_mm={list(spacing_mm)} are not three numbers", "give spacing_mm=(z, y, x)")
    spacing_xyz = check_spacing([float(size) for size in spacing_mm][::-1], "array")
    voxels_xyz = values_DHW.transpose(2, 1, 0)
    if voxels_xyz.dtype.kind == "f":
        voxels_xyz = voxels_xyz.copy()  # voxels that are not finite are filled in place
    affine = UNKNOWN_DIRECTIONS @ np.diag([*spacing_xyz, 1.0])
    return RawVolume(voxels_xyz, affine, spacing_xyz, 1.0, 0.0, True, path="array", hounsfield=True)
