"""CTRG-Chest as slice folders (jpg or png) and as NIfTI with its split JSON (spec pretraining 2 and 4.1, downstream 8).

Slice images are 8-bit grey, windowed already, stored head to feet; the published loader reverses them, so the packed
depth axis runs to superior like everywhere else. The NIfTI variant was made from the same slices and is read in the
same way: values 0..255, stored order, z reversed; its header is believed only on request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mg3d.datasets.arrow_schema import WINDOW_GREY_TEXT
from mg3d.datasets.report_text import MIN_WORDS
from mg3d.datasets.volume import CROP_FRACTIONS_DHW, CTRG_DEPTH_RANGE, TARGET_SPACING_MM, ctrg_stack, quantise_grey
from mg3d.errors import DataError
from mg3d.files import decode_text
from mg3d.paths import confined_path
from mg3d.scans.folders import files_in
from mg3d.scans.geometry import Geometry, grid_spacing, plan_axes, resample_crop, to_canonical
from mg3d.scans.grey_slices import SLICE_SUFFIXES, SliceFiles, sort_slices
from mg3d.scans.read import read_scan
from prepro.readers.base import Case, CaseList, Exclusion, PackedImage
from prepro.text import clean_report, count_words

VOLUME_SUFFIXES = (".nii.gz", ".nii")
NIFTI_ORDERS = ("published", "header")
MAX_SLICE_NUMBER = 100_000
GREY_RANGE = (0.0, 255.0)
ANNOTATION_REMEDY = "complete the download, or mend image_path in the annotation"


@dataclass(frozen=True)
class CtrgReader:
    """Reader of a CTRG-Chest download.

    Attributes:
        root: folder that the image paths of the annotation are relative to.
        annotation: JSON with {train, val, test} lists, or one flat list.
        geometry: the grid to end on; the intermediate resampling is not used, slices carry no spacing.
        nifti_order: ``published`` takes stored axes with z reversed, ``header`` follows the NIfTI directions.
        empty_report: ``skip`` leaves short reports out, ``keep`` packs them.
        max_volume_gib: largest volume to read.
        assumed_spacing_mm: (z, y, x) recorded where the files carry none; None means 1.5 x 0.75 x 0.75 mm.
        encoding: of an annotation that is not UTF-8, see :func:`mg3d.files.decode_text`.
    """

    root: Path
    annotation: Path
    geometry: Geometry
    nifti_order: str = "published"
    empty_report: str = "skip"
    max_volume_gib: float = 4.0
    assumed_spacing_mm: tuple[float, float, float] | None = None
    encoding: str = ""

    corpus: ClassVar[str] = "clm_chest_ctrg"
    label_names: ClassVar[tuple[str, ...]] = ()
    window: ClassVar[str] = WINDOW_GREY_TEXT

    def find_cases(self) -> CaseList:
        """List the annotated scans whose files exist, in annotation order.

        Returns:
            the cases; an id in both val and test counts as test.

        Raises:
            DataError: the annotation is missing or has another structure.
        """
        found = CaseList()
        entries, conflicts = _unique_entries(self._read_annotation(found))
        found.entries = len(entries)
        for position, (image_id, (origin, entry)) in enumerate(entries.items()):
            if image_id in conflicts:
                reason = "two different reports under one id"
                found.exclusions.append(Exclusion(image_id, str(entry.get("image_path", "")), reason))
                continue
            case = self._case(image_id, origin, entry, position)
            if isinstance(case, Exclusion):
                found.exclusions.append(case)
            else:
                found.cases.append(case)
        return found

    def _read_annotation(self, found: CaseList) -> list[tuple[str, dict[str, Any]]]:
        path = self.annotation
        try:
            text, used = decode_text(path.read_bytes(), path, self.encoding)
            found.notes["encodings"] = {path.name: used}
            content = json.loads(text)
        except FileNotFoundError:
            raise DataError("annotation not found", "give --annotation JSON", path=str(path)) from None
        except (OSError, ValueError, RecursionError) as problem:
            raise DataError(f"not readable as JSON ({problem})", "download it again", path=str(path)) from problem
        groups = content if isinstance(content, dict) else {"": content}
        entries = [(split, entry) for split, group in groups.items() if isinstance(group, list) for entry in group]
        if not entries or not all(isinstance(entry, dict) for _, entry in entries):
            remedy = "expected {train, val, test} lists of {id, report, result, image_path}, or one list"
            raise DataError("annotation holds no list of entries", remedy, path=str(path))
        return entries

    def _case(self, image_id: str, origin: str, entry: dict[str, Any], position: int) -> Case | Exclusion:
        if entry.get("id") in (None, ""):
            return Exclusion(image_id, str(entry.get("image_path", "")), "entry has no id")
        texts = [entry.get(key) for key in ("report", "result")]
        if not all(isinstance(text, str) for text in texts):
            return Exclusion(image_id, str(entry.get("image_path", "")), "entry lacks the text 'report' or 'result'")
        findings, impression = (clean_report(text) for text in texts)
        if self.empty_report == "skip" and count_words(findings) < MIN_WORDS:
            reason = f"findings have fewer than {MIN_WORDS} words"
            return Exclusion(image_id, str(entry.get("image_path", "")), reason)
        try:
            source = self._source(entry.get("image_path"))
        except DataError as problem:
            return Exclusion(image_id, str(entry.get("image_path", "")), problem.message)
        return Case(image_id, image_id, origin, source, findings, impression, position=position)

    def _source(self, image_path: Any) -> tuple[Path, ...]:
        if isinstance(image_path, str) and image_path:
            path = confined_path(self.root, image_path)
            if path.is_dir():
                files = [file for file in files_in(path) if file.suffix.lower() in SLICE_SUFFIXES]
                return sort_slices(files, image_path)
            if not path.is_file():
                raise DataError(f"no file or folder {image_path!r} below the root", ANNOTATION_REMEDY)
            return (path,)
        if isinstance(image_path, list) and image_path and all(isinstance(item, str) for item in image_path):
            files = [confined_path(self.root, item) for item in image_path]
            missing = next((item for file, item in zip(files, image_path, strict=True) if not file.is_file()), None)
            if missing is not None:
                raise DataError(f"slice {missing!r} not found below the root", ANNOTATION_REMEDY)
            return sort_slices(files, image_path[0])
        raise DataError("entry lacks an image_path", ANNOTATION_REMEDY)

    def load(self, case: Case) -> PackedImage:
        """Read one scan and bring it onto the final grid.

        Args:
            case: from :meth:`find_cases`.

        Returns:
            uint8 grey on the configured grid.

        Raises:
            DataError: a slice or the volume is damaged, or values leave 0..255.
        """
        if case.source[0].name.endswith(VOLUME_SUFFIXES):
            return self._load_nifti(case.source[0])
        slices = SliceFiles(case.source)
        rows, columns = slices.shape
        crop = tuple(int(n * part) for n, part in zip((rows, columns), self.geometry.crop_fractions[1:], strict=True))
        try:
            unit = ctrg_stack(slices, self.geometry.size, crop, self._depth_range())[:, 0]
        except ValueError as problem:
            raise DataError(str(problem), "check the slice files", path=str(case.source[0].parent)) from problem
        first, last = (int(part * len(slices)) for part in self._depth_range())
        extents = [n * s for n, s in zip((last - first, *crop), self._assumed_spacing(), strict=True)]
        spacing = tuple(extent / size for extent, size in zip(extents, self.geometry.size, strict=True))
        record = {"slices": len(slices), "slice_shape_HW": [rows, columns], "spacing": "assumed"}
        record |= {"first_slice": case.source[0].name, "last_slice": case.source[-1].name}
        record["source_sha256"] = slices.sha256()
        return PackedImage(quantise_grey(unit), (spacing[0], spacing[1], spacing[2]), record, _gaps(case.source))

    def _load_nifti(self, path: Path) -> PackedImage:
        raw = read_scan(path, self.max_volume_gib)
        voxels = raw.voxels_xyz
        low, high = (float(limit) * raw.slope + raw.intercept for limit in (voxels.min(), voxels.max()))
        if not (GREY_RANGE[0] <= low <= high <= GREY_RANGE[1]):
            raise DataError(
                f"values {low:g}..{high:g} are not 8-bit grey", "pack HU volumes as ct_rate", path=str(path)
            )
        if self.nifti_order == "header":
            spacing_xyz = raw.spacing_mm or self._assumed_spacing()[::-1]
            stored, spacing, _ = to_canonical(voxels, raw.affine, spacing_xyz)
        else:
            stored, spacing = voxels.transpose(2, 1, 0)[::-1], self._assumed_spacing()
            if raw.oriented and raw.spacing_mm is not None:
                spacing = (raw.spacing_mm[2], raw.spacing_mm[1], raw.spacing_mm[0])
        geometry = Geometry(self.geometry.size, None, self.geometry.crop_fractions, self.geometry.store)
        plans = plan_axes(stored.shape, spacing, geometry, align_corners=True)
        grey = resample_crop(stored, plans, raw.slope, raw.intercept, GREY_RANGE)
        record = {"stored_shape_DHW": list(stored.shape), "order": self.nifti_order}
        record["source_sha256"] = raw.source_sha256
        return PackedImage(np.rint(grey).astype(np.uint8), grid_spacing(plans), record, raw.warnings)

    def _depth_range(self) -> tuple[float, float]:
        fraction = self.geometry.crop_fractions[0]
        if fraction == CROP_FRACTIONS_DHW[0]:
            return CTRG_DEPTH_RANGE  # as written in the published code; computed, it would round differently
        return (1 - fraction) / 2, (1 + fraction) / 2

    def _assumed_spacing(self) -> tuple[float, float, float]:
        return self.assumed_spacing_mm or TARGET_SPACING_MM


def _gaps(files: Sequence[Path]) -> tuple[str, ...]:
    """Warning about numbers that are missing between the first and the last slice."""
    endings = [re.findall(r"\d+", file.stem)[-1:] for file in files]
    numbers = {int(ending[0]) for ending in endings if ending}
    if len(numbers) < len(files):
        return ()
    missing = sorted(set(range(min(numbers), max(numbers))) - numbers) if max(numbers) < MAX_SLICE_NUMBER else []
    shown = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
    return (f"{len(missing)} slice numbers are missing: {shown}",) if missing else ()


def _unique_entries(
    entries: list[tuple[str, dict[str, Any]]],
) -> tuple[dict[str, tuple[str, dict[str, Any]]], set[str]]:
    """One entry per id, first place kept, and the ids that have two different reports.

    An id listed in val and test, as published, belongs to test.
    """
    unique: dict[str, tuple[str, dict[str, Any]]] = {}
    conflicts = set()
    for number, (group, entry) in enumerate(entries):
        image_id = _image_id(entry, number)
        origin = group or str(entry.get("split", ""))
        first_origin, first = unique.setdefault(image_id, (origin, entry))
        if any(first.get(key) != entry.get(key) for key in ("report", "result")):
            conflicts.add(image_id)
        if origin == "test" and first_origin != "test":
            unique[image_id] = (origin, first)
    return unique, conflicts


def _image_id(entry: dict[str, Any], number: int) -> str:
    name = str(entry["id"]) if entry.get("id") not in (None, "") else f"entry_{number}"
    name = name.encode("utf-8", "replace").decode()
    return next((name.removesuffix(end) for end in VOLUME_SUFFIXES if name.endswith(end)), name)
