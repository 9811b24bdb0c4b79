"""``status.json`` of a run: running, finished, stopped or failed, kept up to date by rank 0."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from mg3d.errors import MG3DError
from mg3d.training.failures import told_plainly
from mg3d.training.run_folder import run_lock, write_json

__all__ = ["STATUS", "tracked"]

STATUS = "status.json"


def tracked(rank: int, run_dir: Path, execute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run with the status kept up to date and the folder marked as being written.

    Args:
        rank: this process; rank 0 writes.
        run_dir: folder of the run.
        execute: the work; its result has "steps".

    Raises:
        MG3DError: what ``execute`` raised, told plainly where the cause is known.
    """
    with run_lock(run_dir) if rank == 0 else nullcontext():
        return _tracked(rank, run_dir, execute)


def _tracked(rank: int, run_dir: Path, execute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.time()

    def note(state: str, **more: Any) -> None:
        if rank == 0:
            write_json(run_dir / STATUS, {"state": state, "seconds": round(time.time() - started, 1), **more})

    note("running", pid=os.getpid())
    try:
        with told_plainly():
            result = execute()
    except BaseException as error:
        with suppress(MG3DError):
            stopped = isinstance(error, MG3DError) and error.exit_code > 128
            reason = error.message if isinstance(error, MG3DError) else f"{type(error).__name__}: {error}"
            note("stopped" if stopped else "failed", reason=reason)
        raise
    note("finished", steps=result["steps"])
    return result
