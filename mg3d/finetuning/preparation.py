"""The stage before training: the phantom data set, the benchmark's own preparation, one process at a time."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mg3d.atomic import atomic_folder
from mg3d.locks import exclusive_output

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Benchmark
    from mg3d.finetuning.config import FinetuneConfig

log = logging.getLogger(__name__)

__all__ = ["prepare_data", "write_phantom"]


def write_phantom(benchmark: Benchmark, cfg: FinetuneConfig) -> None:
    """Write the phantom data set to ``data_root`` unless something is there already.

    It is written beside its place and renamed, so that a kill leaves no half of it.

    Raises:
        EnvironmentProblem: the place cannot be written.
        OutputError: the disk is full.
    """
    root = Path(cfg.data_root)
    if root.is_dir() and any(root.iterdir()):
        return
    with exclusive_output(root, wait=True, what="data_root="):
        if root.is_dir() and any(root.iterdir()):  # another process has just written it
            return
        with atomic_folder(root, "give data_root= a place that can be written and has free space") as partial:
            benchmark.write_phantom(partial, cfg.phantom_seed)
    log.info("wrote the phantom data set of %s to %s", benchmark.name, root)


def prepare_data(benchmark: Benchmark, cfg: FinetuneConfig) -> None:
    """Write the phantom data set where one is asked for, then prepare what ``splits`` reads."""
    if cfg.phantom:
        write_phantom(benchmark, cfg)
    if benchmark.prepare is not None and "prepare" in cfg.stages:
        with _alone(Path(cfg.work_dir)):
            benchmark.prepare(cfg)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Wait for another run that prepares the same folder; nothing to wait for where it cannot be written."""
    there = next(place for place in folder.absolute().parents if place.is_dir())
    return exclusive_output(folder, wait=True, what="work_dir=") if os.access(there, os.W_OK) else nullcontext()
