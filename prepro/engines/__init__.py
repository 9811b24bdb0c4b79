"""Where scans are read: in this process, in several on this machine, or on a Dask cluster; the results are the same.

    engine = create_engine(workers=4, scheduler=None)
    for case, result in load_in_order(reader, cases, engine): ...

Every engine takes the cases as it needs them, hands results back in the order of the cases, keeps a bounded number in
flight, and turns a scan that cannot be read, or that kills the process reading it, into a :class:`Failure`.
"""

from __future__ import annotations

from prepro.engines.base import Engine, Failure, load_in_order
from prepro.engines.local import LocalEngine

__all__ = ["Engine", "Failure", "create_engine", "load_in_order"]


def create_engine(workers: int, scheduler: str | None = None) -> Engine:
    """Choose where scans are read.

    Args:
        workers: processes of this machine; 1 or less reads in this process. Ignored with a scheduler.
        scheduler: address of a Dask scheduler (``tcp://host:port``) or its scheduler file; None stays on this machine.

    Returns:
        the engine for :func:`load_in_order`.

    Raises:
        EnvironmentProblem: Dask is not installed, or the scheduler does not answer.
    """
    if scheduler:
        from prepro.engines.dask_cluster import DaskEngine

        engine = DaskEngine(scheduler)
        engine.check()
        return engine
    if workers > 1:
        from prepro.engines.pool import PoolEngine

        return PoolEngine(workers)
    return LocalEngine()
