"""The manifest beside a packed file: read it, and compare the file with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from prepro.manifest import iterate_cases, manifest_name, read_head
from prepro.verification.findings import Finding, finding

SHA256: Final = re.compile(r"[0-9a-f]{64}")
NEEDED: Final = {"rows": int, "bytes": int, "sha256": str, "cases": list}


def manifest_path(arrow: Path) -> Path:
    """Return the place of a packed file's manifest."""
    return arrow.with_name(manifest_name(arrow.name))


class ListedCase(NamedTuple):
    """What a manifest says of a row, as far as it is compared; ``sha256`` is that of the voxels."""

    image_id: str
    patient_id: str
    row_crc32: int
    sha256: str


def read_manifest(arrow: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Read the manifest of a packed file; its ``cases`` become :class:`ListedCase`.

    Args:
        arrow: the packed file.

    Returns:
        the manifest, None when there is none or it cannot be used, and what is wrong with it.
    """
    path = manifest_path(arrow)
    if not path.exists():
        return None, [finding("manifest_missing", f"{path.name} is not there", path=str(arrow))]
    try:
        content = _read(path)
        wrong = [name for name, kind in NEEDED.items() if not isinstance(content.get(name), kind)]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as problem:
        seen = f"not readable ({type(problem).__name__}: {problem})"
        return None, [finding("manifest_unreadable", seen, path=str(path))]
    if wrong:
        return None, [finding("manifest_unreadable", f"lacks {', '.join(wrong)}", path=str(path))]
    return content, list(_inner_problems(content, arrow, path))


def _read(path: Path) -> dict[str, Any]:
    """Read the cases one by one where the file is written so, or all of it."""
    content = read_head(path) or {}
    if "cases" not in content and all(name in content for name in NEEDED if name != "cases"):
        return content | {"cases": [_listed(case) for case in iterate_cases(path)]}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content | {"cases": [_listed(case) for case in content["cases"]]}


def _listed(case: Mapping[str, Any]) -> ListedCase:
    voxels = str(case.get("image_sha256", ""))
    return ListedCase(str(case["image_id"]), str(case["patient_id"]), int(case["row_crc32"]), voxels)


def _inner_problems(content: Mapping[str, Any], arrow: Path, path: Path) -> Iterator[Finding]:
    if content.get("file", arrow.name) != arrow.name:
        yield finding("manifest_differs", f"the manifest is of {content['file']}", path=str(path))
    if len(content["cases"]) != content["rows"]:
        seen = f"the manifest counts {content['rows']} rows and lists {len(content['cases'])}"
        yield finding("manifest_unreadable", seen, path=str(path))
    if "rows_sha256" in content and content["rows_sha256"] != _rows_digest(content["cases"]):
        yield finding("manifest_unreadable", "its list of rows does not fit its own digest", path=str(path))


def _rows_digest(cases: Iterable[ListedCase]) -> str:
    """Digest of the rows' ids and checksums, as the packer writes it."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.image_id} {case.sha256} {case.row_crc32}\n".encode())
    return digest.hexdigest()


@dataclass
class Comparison:
    """A packed file against its manifest, row by row and as a whole.

    Attributes:
        path: the packed file.
        manifest: from :func:`read_manifest`; None compares nothing.
        findings: what disagrees so far.
    """

    path: str
    manifest: Mapping[str, Any] | None
    findings: list[Finding] = field(default_factory=list)

    def size(self, size: int) -> bool:
        """Compare the size in bytes; return whether it agrees."""
        if self.manifest is None or size == self.manifest["bytes"]:
            return True
        word = "cut off" if size < self.manifest["bytes"] else "too long"
        self._add("manifest_differs", f"{word}: {size:,} bytes, the manifest says {self.manifest['bytes']:,}")
        return False

    def rows(self, rows: int) -> None:
        """Compare the number of rows."""
        if self.manifest is not None and rows != self.manifest["rows"]:
            self._add("manifest_differs", f"{rows} rows, the manifest says {self.manifest['rows']}")

    def listed_id(self, number: int) -> str:
        """Image id that the manifest lists at a place, "" without one."""
        if self.manifest is None or number >= len(self.manifest["cases"]):
            return ""
        return self.manifest["cases"][number].image_id

    def row(self, number: int, row: Mapping[str, Any]) -> str:
        """Compare one row with the case listed at its place; return the listed sha256 of its voxels if it agrees."""
        if self.manifest is None or number >= len(self.manifest["cases"]):
            return ""
        case: ListedCase = self.manifest["cases"][number]
        for name in ("image_id", "patient_id", "row_crc32"):
            if name in row and getattr(case, name) != row[name]:
                shown = f"{name} {row[name]!r}, the manifest says {getattr(case, name)!r}"
                self.findings.append(
                    finding("row_differs", shown, path=self.path, row=number, case=str(row["image_id"]))
                )
                return ""
        return case.sha256 if SHA256.fullmatch(case.sha256) else ""

    def digest(self, sha256: str) -> None:
        """Compare the digest of the whole file."""
        if self.manifest is not None and sha256 != self.manifest["sha256"]:
            where = "" if any(item.code.startswith("row_") for item in self.findings) else ": bytes were changed"
            self._add("manifest_differs", f"sha256 {sha256[:12]}..., the manifest says another{where}")

    def _add(self, code: str, message: str) -> None:
        self.findings.append(finding(code, message, path=self.path))
