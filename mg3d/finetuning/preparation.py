"""The stage before training: the phantom data set, the benchmark's own preparation, one process at a time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mg3d.errors import EnvironmentProblem

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Benchmark
    from mg3d.finetuning.config import FinetuneConfig

log = logging.getLogger(__name__)

__all__ = ["prepare_data", "write_phantom"]

PARTIAL = ".partial"


def write_phantom(benchmark: Benchmark, cfg: FinetuneConfig) -> None:
    """Write the phantom data set to ``data_root`` unless something is there already.

    It is written beside its place and renamed, so that a kill leaves no half of it.

    Raises:
        EnvironmentProblem: the place cannot be written.
    """
    import shutil

    root = Path(cfg.data_root)
    if root.is_dir() and any(root.iterdir()):
        return
    partial = root.with_name(f".{root.name}{PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        benchmark.write_phantom(partial, cfg.phantom_seed)
        if root.is_dir():
            root.rmdir()
        partial.rename(root)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write the phantom data set to {root}: {error}", "give data_root= a place that can be written"
        ) from error
    log.info("wrote the phantom data set of %s to %s", benchmark.name, root)


def prepare_data(benchmark: Benchmark, cfg: FinetuneConfig) -> None:
    """Write the phantom data set where one is asked for, then prepare what ``splits`` reads."""
    if cfg.phantom:
        write_phantom(benchmark, cfg)
    if benchmark.prepare is not None and "prepare" in cfg.stages:
        benchmark.prepare(cfg)
