"""The report: findings grouped for a reader, all of them for a program."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from mg3d.atomic import write_text_atomically
from prepro.verification.findings import KINDS, SEVERITIES, Finding, Severity

MAX_SHOWN: Final = 10
TITLES: Final = {"error": "ERRORS: mend them", "warning": "WARNINGS: look at them", "note": "NOTES"}


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
        lines = [line for severity in SEVERITIES for line in self._section(severity)]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        what = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.checked.items() if count)
        counts = {severity: self.count(severity) for severity in SEVERITIES}
        found = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)
        return f"checked {what or 'nothing'}: {found or 'nothing wrong'}"

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
    for path, group in groupby(items[:MAX_SHOWN], key=lambda item: item.path):
        lines = [_line(item) for item in group]
        if len(lines) == 1 or not path:
            yield from (f"    {': '.join(part for part in (path, line) if part)}" for line in lines)
        else:
            yield f"    {path}"
            yield from (f"      {line}" for line in lines)
    if len(items) > MAX_SHOWN:
        yield f"    and {len(items) - MAX_SHOWN} more (--json FILE lists all)"


def _line(item: Finding) -> str:
    known = item.path + item.message
    parts = [f"row {item.row}" if item.row >= 0 else "", item.case if item.case not in known else ""]
    place = " ".join(part for part in parts if part)
    if item.message == item.path or not item.message:
        return place
    return f"{place}: {item.message}" if place else item.message


def write_json(report: Report, path: Path, exit_code: int, paths: list[str]) -> None:
    """Write every finding for a program.

    Args:
        report: what was found.
        path: the file to write.
        exit_code: of the run.
        paths: what was checked.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {
        "exit": exit_code,
        "paths": paths,
        **report.summary(),
        "findings": [item.to_json() for item in report.findings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=1))
