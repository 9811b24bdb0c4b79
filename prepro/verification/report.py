"""The report: findings grouped for a reader, all of them for a program."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prepro.verification.findings import KINDS, SEVERITIES, Finding, Severity

MAX_SHOWN: Final = 10
TITLES: Final = {"error": "ERRORS: mend before training", "warning": "WARNINGS: look at them", "note": "NOTES"}


@dataclass
class Report:
    """Everything a run found.

    Attributes:
        findings: in the order they were found.
        checked: what was looked at: files, rows, scans.
    """

    findings: list[Finding] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(item.severity == severity for item in self.findings)

    def exit_code(self, strict: bool) -> int:
        """Return 2 with errors, 1 with warnings when ``strict``, else 0."""
        if self.count("error"):
            return 2
        return 1 if strict and self.count("warning") else 0

    def summary(self) -> dict[str, Any]:
        """Counts: what was checked, findings per severity, findings per kind."""
        counts = {f"{severity}s": self.count(severity) for severity in SEVERITIES}
        kinds = Counter(item.code for item in self.findings)
        return {**self.checked, **counts, "kinds": dict(sorted(kinds.items()))}

    def text(self) -> str:
        """Return the findings for a reader: by severity, then by kind, each kind with its mend, long lists cut."""
        return "\n".join(line for severity in SEVERITIES for line in self._section(severity))

    def _section(self, severity: Severity) -> Iterator[str]:
        kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
        for item in self.findings:
            if item.severity == severity:
                kinds[item.code, item.remedy].append(item)
        if kinds:
            yield f"{TITLES[severity]} ({self.count(severity)})"
        for (code, remedy), items in kinds.items():
            yield f"  {KINDS[code].title} [{code}, {len(items)}]"
            yield from _lines(items)
            yield f"    mend: {remedy}"


def _lines(items: Sequence[Finding]) -> Iterator[str]:
    previous = ""
    for item in items[:MAX_SHOWN]:
        if item.path != previous and item.path:
            yield f"    {item.path}"
        previous = item.path
        row = f"row {item.row}" if item.row >= 0 else ""
        named = item.case if item.case and item.case not in item.message else ""
        place = " ".join(part for part in (row, named) if part)
        yield f"      {place}: {item.message}" if place else f"      {item.message}"
    if len(items) > MAX_SHOWN:
        yield f"      and {len(items) - MAX_SHOWN} more (--json FILE lists all)"


def write_json(report: Report, path: Path, exit_code: int, paths: list[str]) -> None:
    """Write every finding for a program.

    Args:
        report: what was found.
        path: the file to write.
        exit_code: of the run.
        paths: what was checked.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "exit": exit_code,
        "paths": paths,
        **report.summary(),
        "findings": [item.to_json() for item in report.findings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
