"""The journal of an unfinished Arrow file: one JSON line per processed case, written after its row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of JSON objects, a header first, whose last line may be torn.

    Args:
        path: the file; :meth:`start` makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def header(self) -> dict[str, Any] | None:
        """Return the first line, None when there is none."""
        return next((entry for _, entry in self._lines()), None)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the complete entries after the header, in the order they were written."""
        lines = self._lines()
        next(lines, None)
        for _, entry in lines:
            yield entry

    def start(self, header: Mapping[str, Any]) -> None:
        """Begin afresh.

        Args:
            header: the first line.
        """
        self.path.unlink(missing_ok=True)
        self.append(header)

    def keep(self, count: int) -> None:
        """Cut off everything behind the header and the first ``count`` entries.

        Args:
            count: entries to keep, at most those there are.
        """
        end = next(end for number, (end, _) in enumerate(self._lines()) if number == count)
        os.truncate(self.path, end)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line and hand it to the operating system.

        Args:
            entry: plain JSON values.
        """
        with self.path.open("ab") as handle:
            handle.write(json.dumps(entry, sort_keys=True).encode() + b"\n")

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the offset behind each complete line and what the line says."""
        if not self.path.exists():
            return
        end = 0
        with self.path.open("rb") as handle:
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                try:
                    entry = json.loads(line)
                except ValueError:
                    return
                end += len(line)
                yield end, entry
