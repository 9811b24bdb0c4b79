"""What the checks report: findings of a known kind, each with its place and its mend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "note")


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        severity: ``error`` must be mended, ``warning`` should be looked at, ``note`` is worth knowing.
        title: what all findings of this kind have in common.
        remedy: how to mend it, unless a finding knows better.
    """

    severity: Severity
    title: str
    remedy: str


_REPACK = "pack the file again with prepro/prepro_pretraining_data.py, or copy it again from its source"
_CONTINUE = "run the packing command again: it continues where it stopped"
_LISTS = "repair the split lists and pack again; --split-protocol reference packs published overlaps anyway"
_LOOK = "look at the scan with tools/visualize_datasets.py; leave it out with --exclude if it is no chest CT"

KINDS: Final[Mapping[str, Kind]] = {
    # where to look
    "not_found": Kind("error", "no such file or folder", "check the path"),
    "nothing_to_check": Kind(
        "error",
        "neither packed files nor a known download",
        "give an .arrow file, a folder of them, a CT-RATE root, a CTRG root with --annotation JSON, or your CSV",
    ),
    # packed files as a set
    "missing_shard": Kind("error", "files of a split are missing or compete", "pack or copy them again"),
    "missing_split": Kind("warning", "a split has no file", "pack the corpus again, or copy the file"),
    "unfinished_run": Kind("warning", "left by a packing run that did not finish", _CONTINUE),
    "orphan_manifest": Kind("error", "a manifest without its arrow file", "copy the arrow file, or pack again"),
    "metadata_differs": Kind("error", "files of one corpus were packed with different settings", "pack them together"),
    # one packed file
    "file_unreadable": Kind("error", "packed file cannot be opened", _REPACK),
    "no_rows": Kind("error", "packed file holds no rows", "pack the split again, or leave the corpus out"),
    "no_rows_expected": Kind(
        "warning", "packed file holds no rows, as its manifest says", "training refuses it: pack more scans"
    ),
    "name_unknown": Kind(
        "warning", "file name does not say corpus and split", "name it CORPUS_{train,val,test}.arrow, as packed"
    ),
    "manifest_missing": Kind(
        "warning",
        "no manifest: missing rows and damage outside the rows cannot be seen",
        "copy NAME.manifest.json beside the arrow file, or pack again",
    ),
    "manifest_unreadable": Kind("error", "manifest cannot be used", "copy the manifest again, or pack again"),
    "manifest_differs": Kind("error", "file and manifest disagree", _REPACK),
    "published_layout": Kind(
        "note", "published layout without checksums: damage cannot be seen", "pack the scans with prepro to get them"
    ),
    # one row
    "row_damaged": Kind("error", "damaged row", _REPACK),
    "row_differs": Kind("error", "row is not the one the manifest lists", _REPACK),
    "shape_differs": Kind("error", "volume has another size than the file's geometry", _REPACK),
    "type_differs": Kind("error", "voxel type does not fit the file's intensity window", _REPACK),
    "outside_window": Kind("warning", "voxel values outside the window", "training clips them; " + _LOOK),
    "constant_volume": Kind("warning", "all voxels are equal", _LOOK),
    "empty_slices": Kind("warning", "many slices of one single value", _LOOK),
    "implausible_hu": Kind(
        "warning", "values do not look like a chest CT in HU", "pack again with --rescale auto; " + _LOOK
    ),
    "spacing_invalid": Kind("error", "voxel spacing is not three positive numbers", _REPACK),
    "spacing_odd": Kind("warning", "volume is not of a chest's size", "repair the spacing of the scan and pack again"),
    "labels_invalid": Kind("error", "labels are not 0, 1 or -1, one per name", "repair the label table; pack again"),
    "text_invalid": Kind("error", "text column is null or not one text", _REPACK),
    "text_missing_word": Kind("error", "empty report became a word like 'nan'", "pack again: prepro reads it as empty"),
    "empty_report": Kind("warning", "rows without report", "pack without --empty-report keep to leave them out"),
    "fragments_differ": Kind("warning", "fragments do not cover the text", "pack again: fragments come from the text"),
    "caption_differs": Kind("warning", "caption lacks the report's text", "pack again: it is made from the text"),
    "id_missing": Kind("error", "row without image or patient id", "add the id to the table and pack again"),
    "split_differs": Kind("error", "row belongs to another split or corpus than its file", _REPACK),
    "slice_undecodable": Kind("error", "encoded slice cannot be decoded", _REPACK),
    # rows against each other
    "duplicate_id": Kind("error", "one image id in several rows of a split", "keep one of them and pack again"),
    "duplicate_content": Kind("warning", "equal volumes in one split", "leave one out with --exclude"),
    "patient_in_two_splits": Kind("error", "one patient in two splits", _LISTS),
    "study_in_two_splits": Kind("error", "reconstructions of one study in two splits", _LISTS),
    "content_in_two_splits": Kind(
        "error", "equal volumes in two splits", "leave one out with --exclude and pack again"
    ),
    # a download
    "tree_unreadable": Kind("error", "download cannot be listed", "repair the table or folder that is named"),
    "scan_unreadable": Kind("error", "scan cannot be used", "download it again, or leave it out with --exclude"),
    "scan_empty_file": Kind("error", "scan file is empty", "download the file again"),
    "scan_left_out": Kind("warning", "scan would be left out", "repair its table row or name, or accept the loss"),
    "scan_without_report": Kind("warning", "volume without report", "add its row to the report table"),
    "scan_without_labels": Kind("warning", "volume without labels", "add its row to the label table"),
    "scan_without_metadata": Kind("warning", "volume without metadata", "add its row to the metadata table"),
    "table_not_utf8": Kind("note", "table is not UTF-8", "look at a row with special letters after packing"),
    "nothing_to_pack": Kind("error", "no scan of the download can be packed", "repair what is listed below"),
    "patient_spelled_twice": Kind(
        "warning",
        "two spellings of what looks like one patient id",
        "write one spelling, or ids that differ in more than zeros and case; they count as one patient for the splits",
    ),
    "table_row_odd": Kind("warning", "odd table row", "repair the row"),
    "report_without_scan": Kind("warning", "report without volume", "download the volume, or accept the loss"),
    "spacing_disagrees": Kind(
        "warning", "voxel size of header and table disagree", "the header is used; repair whichever is wrong"
    ),
    "scan_odd": Kind("warning", "scan is usable but odd", _LOOK),
    "mixed_releases": Kind(
        "warning",
        "some volumes need the table's rescale and others do not",
        "check that the volumes come from one release; --rescale auto packs both rightly",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    Attributes:
        code: key of :data:`KINDS`.
        message: what was seen; never report text.
        path: the file.
        row: row in the file, -1 when no row is meant.
        case: image id or scan name, empty when none is meant.
        remedy: how to mend it.
        severity: see :class:`Kind`.
    """

    code: str
    message: str
    path: str
    row: int
    case: str
    remedy: str
    severity: Severity

    def to_json(self) -> dict[str, Any]:
        """Plain values for the report file."""
        place = {"file": self.path, "row": None if self.row < 0 else self.row, "case": self.case}
        return {"severity": self.severity, "code": self.code, **place, "message": self.message, "remedy": self.remedy}


def finding(
    code: str,
    message: str,
    *,
    path: str = "",
    row: int = -1,
    case: str = "",
    remedy: str = "",
    severity: Severity | None = None,
) -> Finding:
    """Make a finding; severity and remedy come from its kind unless given.

    Args:
        code: key of :data:`KINDS`.
        message: what was seen.
        path: the file.
        row: row in the file.
        case: image id or scan name.
        remedy: a better mend than the kind's.
        severity: another severity than the kind's.
    """
    kind = KINDS[code]
    return Finding(code, message, path, row, case, remedy or kind.remedy, severity or kind.severity)


def bare_message(problem: Exception, path: str = "") -> str:
    """Return the message of an error without the place in front: a finding has its own.

    Args:
        problem: any error.
        path: the place, where the error does not carry it.
    """
    message = getattr(problem, "message", "") or f"{type(problem).__name__}: {problem}"
    return message.removeprefix(f"{getattr(problem, 'path', '') or path}: ")
