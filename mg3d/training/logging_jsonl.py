"""One JSON line per optimizer step, on the disk before the next step begins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d.atomic import write_text_atomically
from mg3d.errors import RunFailedError

STEP_LOG = "metrics.jsonl"


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


def take_over(source: Path, target: Path, last_step: int) -> None:
    """Copy the lines up to a step, so that the log of a resumed run holds every step once.

    Args:
        source: log of the run before; nothing is done without it.
        target: log of this run, not there yet.
        last_step: step of the checkpoint that is resumed.
    """
    if not source.is_file():
        return
    kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in read_lines(source) if line["step"] <= last_step]
    write_text_atomically(target, "".join(kept))
