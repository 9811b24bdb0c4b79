"""One JSON line per optimizer step, on the disk before the next step begins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d.errors import RunFailedError


def _json_number(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is written as text ("nan", "inf", "-inf")."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """Append-only file of JSON objects; every line is flushed, floats keep all their digits.

    Args:
        path: file to append to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            RunFailedError: the disk is full or read-only.
        """
        line = json.dumps({key: _json_number(value) for key, value in record.items()}, ensure_ascii=False)
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise RunFailedError(
                f"cannot append to {self.path}: {error.strerror}", "free space or choose another log_dir"
            ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file written by :class:`JsonLines`; a last line cut by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
