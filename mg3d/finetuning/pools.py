"""Pools of report retrieval as keys of a benchmark: checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mg3d.errors import ConfigError, DataError

__all__ = ["read_pools"]


def read_pools(pools: Sequence[str], excluded: str) -> frozenset[str]:
    """Check the names of the pools, and read the list of wrong volumes that ``corrected`` leaves out.

    Args:
        pools: keys of `mg3d.metrics.report_retrieval.POOLS`.
        excluded: text or csv file with one volume name a line, first column; empty for none.

    Returns:
        Names without ``.nii.gz``.

    Raises:
        ConfigError: an unknown pool, or ``corrected`` without a list.
        DataError: the list is missing or empty.
    """
    from mg3d.metrics.report_retrieval import POOLS

    for pool in pools:
        if pool not in POOLS:
            raise ConfigError(f"pools: {pool!r} is no pool", f"choose from {', '.join(POOLS)}")
    if not excluded:
        if "corrected" in pools:
            raise ConfigError("pools: corrected needs the list of wrong volumes", "name its file with excluded=")
        return frozenset()
    path = Path(excluded).expanduser()
    if not path.is_file():
        raise DataError("no such list of volumes to leave out", "mend excluded=", path=str(path))
    lines = (line.split(",")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    names = frozenset(Path(line).name.removesuffix(".nii.gz") for line in lines if line)
    if not names:
        raise DataError("the list of volumes to leave out is empty", "mend excluded=", path=str(path))
    return names
