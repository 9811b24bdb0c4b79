"""What a training of the report labeller was started with: written for, and read by, the one that resumes it."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from mg3d.datasets.labelled_reports import LabelledReports
from mg3d.errors import ConfigError

__all__ = ["read_run", "recalled", "remembered", "table_digest"]

PLACES = ("data", "val", "test", "log_dir")


def remembered(options: argparse.Namespace) -> dict[str, Any]:
    """Options of ``train`` in plain types; places are absolute, so that another folder can resume."""
    found = {key: str(value.absolute()) if isinstance(value, Path) else value for key, value in vars(options).items()}
    if Path(options.text_encoder).is_dir():
        found["text_encoder"] = str(Path(options.text_encoder).absolute())
    return found


def recalled(stored: dict[str, Any]) -> argparse.Namespace:
    """Options of ``train`` from what `remembered` gave."""
    places = {key: Path(stored[key]) for key in PLACES if stored.get(key) is not None}
    return argparse.Namespace(**{"encoding": "", **stored, **places})


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run folder.

    Raises:
        ConfigError: it is no run folder of ``train``.
    """
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no readable {name}", "give the run folder that train has written") from error
    return dict(found)


def table_digest(*tables: LabelledReports) -> str:
    """SHA-256 of ids, texts and labels."""
    found = hashlib.sha256()
    for table in tables:
        found.update(json.dumps([table.ids, table.texts, table.names, table.labels.tolist()]).encode())
    return found.hexdigest()
