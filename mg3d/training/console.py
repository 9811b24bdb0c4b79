"""What a run says in the terminal: progress on standard error, the result on standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d.terminal import tolerate_any_encoding

EVALUATION_TABLE = "evaluation.txt"


def is_first_process() -> bool:
    """Whether this process speaks for the run: the only one, or rank 0 as torchrun, SLURM or the trainer set it."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((rank for rank in ranks if rank), "0") == "0"


def configure_console() -> None:
    """Send the project's log to standard error: notices of the first process, warnings of the others."""
    tolerate_any_encoding()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("mg3d")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)


def summary_line(result: Mapping[str, Any]) -> str:
    """The run folder, the steps and every figure of a run as one JSON object on one line.

    Args:
        result: what :func:`mg3d.training.trainer.run` returns.
    """
    entries: Mapping[str, Any] = result["metrics"]
    means = {name: entry["mean"] for name, entry in entries.items() if isinstance(entry, Mapping) and "mean" in entry}
    about = {name: result[name] for name in ("run_dir", "steps", "protocol") if name in result}
    return json.dumps({**about, **means})


def print_result(result: Mapping[str, Any]) -> None:
    """Print the evaluation table, when the run made one, and the JSON line; the first process only."""
    if not is_first_process():
        return
    table = Path(result["run_dir"]) / EVALUATION_TABLE
    if table.is_file():
        print(table.read_text(encoding="utf-8"))
    print(summary_line(result), flush=True)
