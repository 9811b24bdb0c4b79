"""Manifests: JSON written and read as a stream, one line per case, so that their length costs no memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from subprocess import SubprocessError, run
from typing import Any

import mg3d
from mg3d.datasets.arrow_schema import FORMAT_VERSION

CASES_LINE = ' "cases": [\n'
END_LINE = " ]\n"
SUFFIX = ".manifest.json"


def manifest_name(arrow_name: str) -> str:
    """Return the name of the manifest of an Arrow file."""
    return arrow_name.removesuffix(".arrow") + SUFFIX


def write_manifest(path: Path, head: Mapping[str, Any], cases: Iterable[Mapping[str, Any]] | None = None) -> None:
    """Write and sync a manifest.

    Args:
        path: where; must be renamed by the caller once it may be seen.
        head: everything but the cases.
        cases: one object per row; None leaves the key out.
    """
    text = json.dumps(head, indent=1, sort_keys=True)
    with path.open("w", encoding="utf-8") as handle:
        if cases is None:
            handle.write(text + "\n")
        else:
            handle.write(text.removesuffix("\n}") + ",\n" + CASES_LINE)
            for number, case in enumerate(cases):
                handle.write((",\n  " if number else "  ") + json.dumps(case, sort_keys=True))
            handle.write(f"\n{END_LINE}}}\n")
        handle.flush()
        os.fsync(handle.fileno())


def read_head(path: Path) -> dict[str, Any] | None:
    """Read a manifest without its cases.

    Args:
        path: a file of :func:`write_manifest`.

    Returns:
        its content; None when there is no such file or it is damaged.
    """
    lines = []
    try:
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                if line == CASES_LINE:
                    lines.append(' "": 0}')
                    break
                lines.append(line)
        head = json.loads("".join(lines))
    except (OSError, ValueError):
        return None
    return {key: value for key, value in head.items() if key} if isinstance(head, dict) else None


def iterate_cases(path: Path) -> Iterator[dict[str, Any]]:
    """Read the cases of a manifest one by one.

    Args:
        path: a file of :func:`write_manifest`.

    Yields:
        one object per row.
    """
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            if line == CASES_LINE:
                break
        for line in handle:
            if line == END_LINE:
                return
            if line.strip():
                yield json.loads(line.strip().removesuffix(","))


@cache
def code_version() -> dict[str, str]:
    """Return version, row format and git commit of this code; the commit is empty outside a checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        answer = run(
            command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", timeout=5, check=False
        ).stdout
    except (OSError, SubprocessError):
        answer = ""
    return {"mg3d": mg3d.__version__, "format": FORMAT_VERSION, "commit": answer.strip()}
