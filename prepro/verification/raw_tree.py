"""A download before packing: what is missing on either side, and every scan read to its last byte.

The packer's own readers list and load the scans, so whatever they would refuse is found here first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Final

from mg3d.errors import MG3DError
from mg3d.scans.geometry import Geometry
from prepro import splits
from prepro.engines import Engine, Failure, load_in_order
from prepro.exclusion_list import REASON as EXCLUDED
from prepro.exclusion_list import apply_exclusion_list, read_exclusion_list
from prepro.progress import Progress
from prepro.readers.base import Case, CaseList, PackedImage, Reader
from prepro.readers.ct_rate import CtRateReader
from prepro.verification.arrows import CT_RATE_NAME
from prepro.verification.ct_rate_tables import check_ct_rate_tables
from prepro.verification.findings import Finding, bare_message, finding
from prepro.verification.leakage import Member, compare
from prepro.verification.report import Report

PROBE_GEOMETRY: Final = Geometry(size=(32, 24, 32), target_spacing_mm=None)
"""A coarse grid: scans are read whole all the same, only the resampling is cheap."""
NO_REPORT: Final = "no row in the report table"
TABLE_SPACING: Final = "metadata table says"


@dataclass(frozen=True)
class TreeOptions:
    """How a download is checked.

    Attributes:
        protocol: splits the leakage check assumes, ``clean`` or ``reference``.
        seed: seed of the validation draw.
        val_fraction: share drawn for validation; None takes the default of the corpus.
        exclude: list of scans to leave out.
        quick: look at tables and file sizes only.
        encoding: of lists that are not UTF-8.
    """

    protocol: str = "clean"
    seed: int = 0
    val_fraction: float | None = None
    exclude: Path | None = None
    quick: bool = False
    encoding: str = ""


@dataclass(frozen=True)
class Probe:
    """A reader that loads scans and hands on what was learnt, not the voxels.

    Attributes:
        reader: reads the scans.
    """

    reader: Reader

    corpus: ClassVar[str] = ""
    label_names: ClassVar[tuple[str, ...]] = ()
    window: ClassVar[str] = ""

    def find_cases(self) -> CaseList:
        """List the scans of the reader."""
        return self.reader.find_cases()

    def load(self, case: Case) -> PackedImage:
        """Load a scan; its voxels are replaced by their digest in the record."""
        packed = self.reader.load(case)
        low, high = int(packed.voxels.min()), int(packed.voxels.max())
        warnings = packed.warnings + ((f"every voxel is {low}",) if low == high else ())
        digest = hashlib.sha256(packed.voxels.tobytes()).digest()
        return replace(packed, voxels=packed.voxels[:0], record=packed.record | {"content": digest}, warnings=warnings)


@dataclass
class _Tally:
    contents: dict[str, bytes] = field(default_factory=dict)
    rescale: dict[str, list[str]] = field(default_factory=dict)


def check_tree(reader: Reader, fallback: Iterable[Case], options: TreeOptions, engine: Engine, report: Report) -> None:
    """Check one download.

    Args:
        reader: of its layout, on :data:`PROBE_GEOMETRY`.
        fallback: scans to read when the reader cannot list them.
        options: how to check.
        engine: where scans are read.
        report: takes the findings.
    """
    try:
        found = reader.find_cases()
        if options.exclude is not None:
            found = apply_exclusion_list(found, read_exclusion_list(options.exclude, options.encoding))
        report.findings += _nothing(found, reader)
    except (MG3DError, OSError, ValueError) as problem:
        report.findings.append(_unlisted(problem, reader))
        found = CaseList(cases=list(fallback))
    if isinstance(reader, CtRateReader):
        report.findings += _new(check_ct_rate_tables(reader, found), report.findings)
    report.checked["scans"] += len(found.cases) + len(found.exclusions)
    for name, encoding in found.notes.get("encodings", {}).items():
        if not encoding.startswith("utf-8"):
            report.findings.append(finding("table_not_utf8", f"read as {encoding}", path=name))
    report.findings += _left_out(found)
    for first, second in splits.spelled_twice(found.cases):
        message = splits.spelling_message(first, second)
        report.findings.append(finding("patient_spelled_twice", message, case=second.image_id))
    report.findings += _lacking(found, reader)
    tally = _Tally()
    if options.quick:
        report.findings += _empty_files(found.cases)
    else:
        report.findings += _read_all(reader, found.cases, engine, tally)
        report.findings += _mixed_releases(tally)
    report.checked.update({f"rescale_{decision}": len(names) for decision, names in tally.rescale.items()})
    report.findings += compare(_members(found, reader, options, tally.contents))


def _new(found: Iterable[Finding], known: Iterable[Finding]) -> list[Finding]:
    """Leave out what was said about a file already: the reader stops at the first mistake of a table."""
    stopped_at = {item.path for item in known if item.code == "tree_unreadable"}
    return [item for item in found if item.code != "tree_unreadable" or item.path not in stopped_at]


def _unlisted(problem: Exception, reader: Reader) -> Finding:
    path = getattr(problem, "path", "") or str(getattr(reader, "root", ""))
    return finding("tree_unreadable", bare_message(problem), path=path, remedy=getattr(problem, "remedy", ""))


def _nothing(found: CaseList, reader: Reader) -> Iterator[Finding]:
    """A download of which nothing is left: packing refuses it too. Single losses are warnings."""
    if not found.cases:
        message = f"none of {len(found.exclusions)} scans can be packed" if found.exclusions else "no scan is named"
        yield finding("nothing_to_pack", message, path=str(getattr(reader, "table", "") or getattr(reader, "root", "")))


def _left_out(found: CaseList) -> Iterator[Finding]:
    for item in found.exclusions:
        if item.reason == EXCLUDED:
            continue
        if item.reason == NO_REPORT:
            yield finding("scan_without_report", item.image_id, path=item.path, case=item.image_id)
        else:
            yield finding("scan_left_out", f"{item.image_id}: {item.reason}", path=item.path, case=item.image_id)


def _lacking(found: CaseList, reader: Reader) -> Iterator[Finding]:
    """Scans without labels or metadata; one finding for all where no scan of an official split has them."""
    for origin in sorted({case.origin for case in found.cases}):
        cases = [case for case in found.cases if case.origin == origin]
        if reader.label_names:
            bare = [case for case in cases if not any(label >= 0 for label in case.labels)]
            yield from _each_or_all("scan_without_labels", "label", bare, cases)
        if reader.corpus == "clm_ct_rate":
            bare = [case for case in cases if case.rescale is None and case.table_spacing_mm is None]
            yield from _each_or_all("scan_without_metadata", "metadata", bare, cases)


def _each_or_all(code: str, what: str, bare: list[Case], cases: list[Case]) -> Iterator[Finding]:
    if len(bare) == len(cases) > 1:
        origin = f" of {cases[0].origin}" if cases[0].origin else ""
        message = f"none of the {len(cases)} volumes{origin} has a {what} row: is the table there?"
        yield finding(code, message, path=str(cases[0].source[0].parent))
        return
    for case in bare:
        yield finding(code, case.image_id, path=str(case.source[0]), case=case.image_id)


def _empty_files(cases: Iterable[Case]) -> Iterator[Finding]:
    for case in cases:
        for path in case.source:
            if path.is_file() and path.stat().st_size == 0:
                yield finding("scan_empty_file", "0 bytes", path=str(path), case=case.image_id)


def _read_all(reader: Reader, cases: list[Case], engine: Engine, tally: _Tally) -> Iterator[Finding]:
    with closing(Progress(len(cases), reader.corpus)) as bar:
        for case, result in load_in_order(Probe(reader), cases, engine):
            if isinstance(result, Failure):
                message = result.message.removeprefix(f"{result.path}: ")
                yield finding("scan_unreadable", message, path=result.path, case=case.image_id, remedy=result.remedy)
            else:
                yield from _odd(case, result.warnings)
                tally.contents[case.image_id] = result.record["content"]
                if "rescale" in result.record:
                    tally.rescale.setdefault(str(result.record["rescale"]), []).append(case.image_id)
            bar.step(failed=isinstance(result, Failure))


def _odd(case: Case, warnings: Iterable[str]) -> Iterator[Finding]:
    for message in warnings:
        code = "spacing_disagrees" if message.startswith(TABLE_SPACING) else "scan_odd"
        yield finding(code, message, path=str(case.source[0]), case=case.image_id)


def _mixed_releases(tally: _Tally) -> Iterator[Finding]:
    if len(tally.rescale) > 1:
        counts = ", ".join(f"{len(names)} {decision}" for decision, names in sorted(tally.rescale.items()))
        rarer = min(tally.rescale.values(), key=len)
        shown = ", ".join(rarer[:3]) + (" ..." if len(rarer) > 3 else "")
        yield finding("mixed_releases", f"{counts}; the fewer are {shown}")


def _members(found: CaseList, reader: Reader, options: TreeOptions, contents: dict[str, bytes]) -> list[Member]:
    cases, _ = splits.assign_splits(found, reader.corpus, options.protocol, options.seed, options.val_fraction)
    clean = options.protocol == "clean"
    return [
        Member(
            case.image_id,
            reader.corpus,
            split,
            str(case.source[0]),
            case.patient_id,
            _study(case.image_id),
            contents.get(case.image_id, b""),
            clean,
        )
        for case in cases
        for split in case.splits
    ]


def _study(image_id: str) -> str:
    name = CT_RATE_NAME.fullmatch(image_id)
    return name["study"] if name else ""
