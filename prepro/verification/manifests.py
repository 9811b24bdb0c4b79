"""The manifest beside a packed file: read it, and compare the file with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prepro.manifest import manifest_name
from prepro.verification.findings import Finding, finding

CASE_KEYS: Final = ("image_id", "patient_id", "image_sha256", "row_crc32", "source_sha256")
SHA256: Final = re.compile(r"[0-9a-f]{64}")
NEEDED: Final = {"rows": int, "bytes": int, "sha256": str, "cases": list}


def manifest_path(arrow: Path) -> Path:
    """Return the place of a packed file's manifest."""
    return arrow.with_name(manifest_name(arrow.name))


def read_manifest(arrow: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Read the manifest of a packed file; of its cases only what is compared is kept.

    Args:
        arrow: the packed file.

    Returns:
        the manifest, None when there is none or it cannot be used, and what is wrong with it.
    """
    path = manifest_path(arrow)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_trim_case)
    except FileNotFoundError:
        return None, [finding("manifest_missing", f"{path.name} is not there", path=str(arrow))]
    except (OSError, ValueError, RecursionError) as problem:
        return None, [finding("manifest_unreadable", f"not readable as JSON ({problem})", path=str(path))]
    wrong = _wrong_keys(content)
    if wrong:
        return None, [finding("manifest_unreadable", f"lacks {', '.join(wrong)}", path=str(path))]
    return content, list(_inner_problems(content, arrow, path))


def _trim_case(value: dict[str, Any]) -> dict[str, Any]:
    return {key: value[key] for key in CASE_KEYS if key in value} if "row_crc32" in value else value


def _wrong_keys(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return ["its keys"]
    wrong = [name for name, kind in NEEDED.items() if not isinstance(content.get(name), kind)]
    if not wrong and not all(isinstance(case, dict) and "row_crc32" in case for case in content["cases"]):
        wrong = ["row_crc32 of a case"]
    return wrong


def _inner_problems(content: Mapping[str, Any], arrow: Path, path: Path) -> Iterator[Finding]:
    if content.get("file", arrow.name) != arrow.name:
        yield finding("manifest_differs", f"the manifest is of {content['file']}", path=str(path))
    if len(content["cases"]) != content["rows"]:
        seen = f"the manifest counts {content['rows']} rows and lists {len(content['cases'])}"
        yield finding("manifest_unreadable", seen, path=str(path))
    if "rows_sha256" in content and content["rows_sha256"] != rows_digest(content["cases"]):
        yield finding("manifest_unreadable", "its list of rows does not fit its own digest", path=str(path))


def rows_digest(cases: list[dict[str, Any]]) -> str:
    """Digest of the rows' ids and checksums, as the packer writes it."""
    lines = (f"{case.get('image_id')} {case.get('image_sha256')} {case['row_crc32']}\n" for case in cases)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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

    def row(self, number: int, row: Mapping[str, Any]) -> str:
        """Compare one row with the case listed at its place; return the listed sha256 of its voxels if it agrees."""
        if self.manifest is None or number >= len(self.manifest["cases"]):
            return ""
        case = self.manifest["cases"][number]
        for name in ("image_id", "patient_id", "row_crc32"):
            if name in case and case[name] != row[name]:
                shown = f"{name} {row[name]!r}, the manifest says {case[name]!r}"
                self.findings.append(
                    finding("row_differs", shown, path=self.path, row=number, case=str(row["image_id"]))
                )
                return ""
        known = str(case.get("image_sha256", ""))
        return known if SHA256.fullmatch(known) else ""

    def digest(self, sha256: str) -> None:
        """Compare the digest of the whole file."""
        if self.manifest is not None and sha256 != self.manifest["sha256"]:
            where = "" if any(item.code.startswith("row_") for item in self.findings) else ": bytes were changed"
            self._add("manifest_differs", f"sha256 {sha256[:12]}..., the manifest says another{where}")

    def _add(self, code: str, message: str) -> None:
        self.findings.append(finding(code, message, path=self.path))
