"""Leave out the scans a user names: brain scans among the chests, withdrawn patients, known failures."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mg3d.errors import DataError
from mg3d.files import read_csv, read_text
from prepro.readers.base import Case, CaseList, Exclusion
from prepro.readers.tables import strip_suffix

REASON = "on the exclusion list"
MAX_NOTED = 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExclusionList:
    """Names to leave out.

    Attributes:
        path: the file they come from.
        names: ids, file names or paths in the order of the file, each once.
        header: the first cell of a CSV, which may be a heading instead of a name.
    """

    path: Path
    names: tuple[str, ...]
    header: str = ""


def read_exclusion_list(path: Path, encoding: str = "") -> ExclusionList:
    """Read a list: one name a line with ``#`` comments, or the first column of a ``.csv``.

    Args:
        path: the file.
        encoding: where it is not UTF-8, see :func:`mg3d.files.decode_text`.

    Returns:
        the names.

    Raises:
        DataError: the file cannot be read or holds no name.
    """
    is_table = path.suffix.lower() == ".csv"
    if is_table:
        table = read_csv(path, encoding=encoding)
        lines = [*table.columns[:1], *(row[table.columns[0]] for row in table.rows)]
    else:
        lines = read_text(path, encoding).splitlines()
    names = tuple(dict.fromkeys(filter(None, (line.partition("#")[0].strip() for line in lines))))
    if not names:
        raise DataError("the exclusion list is empty", "name one scan a line, or drop --exclude", path=str(path))
    return ExclusionList(path, names, names[0] if is_table else "")


def apply_exclusion_list(found: CaseList, listed: ExclusionList) -> CaseList:
    """Move the listed scans from the cases to the exclusions.

    A name fits a scan when the parts of its path, without the suffix, end the scan's id or path, or the other way
    round: ``train_1_a_1``, ``train_1_a_1.nii.gz`` and ``/elsewhere/train_1_a/train_1_a_1.nii.gz`` fit one volume.

    Args:
        found: what a reader found.
        listed: names to leave out.

    Returns:
        a list with fewer cases; ``notes`` counts names that fit no scan.

    Raises:
        DataError: a name without a folder fits scans of several folders.
    """
    known = _Names(found)
    dropped: set[str] = set()
    unknown: list[str] = []
    for name in listed.names:
        fitting = known.fitting(name)
        image_ids = fitting - {""}
        if len(image_ids) > 1:
            shown = ", ".join(sorted(image_ids)[:3])
            remedy = "write more of the path, so that it fits one scan"
            raise DataError(f"{name!r} fits {len(image_ids)} scans: {shown}", remedy, path=str(listed.path))
        if not fitting and name != listed.header:
            unknown.append(name)
        dropped |= image_ids
    if unknown:
        logger.warning(
            "%d of %d names on the exclusion list fit no scan: %s ...", len(unknown), len(listed.names), unknown[0]
        )
    out = [Exclusion(case.image_id, str(case.source[0]), REASON) for case in found.cases if case.image_id in dropped]
    notes = {"names": len(listed.names), "excluded": len(out), "unknown": len(unknown)}
    return replace(
        found,
        cases=[case for case in found.cases if case.image_id not in dropped],
        exclusions=[*found.exclusions, *out],
        notes=found.notes | {"exclusion_list": notes, "exclusion_list_unknown": unknown[:MAX_NOTED]},
    )


class _Names:
    """The names a scan goes by, looked up by their last part."""

    def __init__(self, found: CaseList) -> None:
        self._by_last: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
        for case in found.cases:
            self._add(case.image_id, case.image_id)
            self._add(_place(case), case.image_id)
        for item in found.exclusions:  # left out for another reason already: known, nothing to do
            self._add(item.image_id, "")

    def _add(self, name: str, image_id: str) -> None:
        parts = _parts(name)
        if parts:
            self._by_last[parts[-1]].append((parts, image_id))

    def fitting(self, name: str) -> set[str]:
        """Ids of the scans a listed name fits; "" for one that is left out already."""
        parts = _parts(name)
        near = self._by_last.get(parts[-1], []) if parts else []
        return {image_id for other, image_id in near if _ends_with(parts, other) or _ends_with(other, parts)}


def _place(case: Case) -> str:
    return str(case.source[0] if len(case.source) == 1 else case.source[0].parent)


def _parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name.replace("\\", "/"))
    parts = tuple(part for part in path.parts if part not in ("/", "."))
    return (*parts[:-1], strip_suffix(parts[-1])) if parts else ()


def _ends_with(longer: tuple[str, ...], shorter: tuple[str, ...]) -> bool:
    return len(shorter) <= len(longer) and longer[len(longer) - len(shorter) :] == shorter
