"""Run independent pieces of tensor work on one thread each, instead of every small operation on all of them.

Waking the threads for an operation of a tenth of a millisecond costs as much as the operation, and far more on a
shared machine. Here each thread works through its own list of pieces.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
Result = TypeVar("Result")
PORTION_BYTES = 2**21
"""Intermediate values of one core: about its own cache."""
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def share_out(items: Sequence[Item], costs: Sequence[float], threads: int) -> list[list[Item]]:
    """Divide work into one list per thread, the same for the same input: largest first, each to the least loaded.

    Args:
        items: independent pieces of work.
        costs: what each is expected to take, in any unit.
        threads: number of lists; empty ones are left out.
    """
    shares: list[list[Item]] = [[] for _ in range(threads)]
    loads = [0.0] * threads
    for index in sorted(range(len(items)), key=lambda index: -costs[index]):
        lightest = loads.index(min(loads))
        shares[lightest].append(items[index])
        loads[lightest] += costs[index]
    return [share for share in shares if share]


def in_full_precision(norm: nn.LayerNorm, x: Tensor) -> bool:
    """Whether layers that begin with ``norm`` compute on a CPU in single or double precision throughout.

    Args:
        norm: LayerNorm; without weights of its own the answer is no.
        x: its input.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    return norm.weight is not None and norm.weight.dtype == x.dtype


def rows_in_cache(width: int) -> int:
    """Rows of so many single precision values that one core works on at a time.

    Args:
        width: values per row.
    """
    return max(1, PORTION_BYTES // (4 * width))


def run_shares(work: Callable[[list[Item]], Result], shares: Sequence[list[Item]]) -> list[Result]:
    """Call ``work`` once per share without recording gradients, at the same time if there are several.

    Args:
        work: touches nothing that another share touches.
        shares: from :func:`share_out`.

    Returns:
        The results in the order of the shares.
    """
    if len(shares) == 1:
        return [work(shares[0])]

    inference = torch.is_inference_mode_enabled()  # like the gradient mode, each thread has its own

    def quietly(share: list[Item]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # the other way round gradients would be back on
            return work(share)

    return list(_pool(len(shares)).map(quietly, shares))


def run_rows(work: Callable[[slice], Result], rows: int) -> list[Result]:
    """Call ``work`` with equal parts of consecutive rows, one per thread; else as :func:`run_shares`.

    Args:
        work: touches nothing that belongs to other rows.
        rows: how many there are.

    Returns:
        The results in the order of the rows.
    """
    threads = max(1, min(torch.get_num_threads(), rows))
    edges = [rows * index // threads for index in range(threads + 1)]
    return run_shares(lambda share: work(*share), [[slice(*pair)] for pair in pairwise(edges)])


def sum_up(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """Sum over the shares of each of their tensors, always in the same order.

    Args:
        parts: equally long lists, one per share.
    """
    return [each[0] if len(each) == 1 else torch.stack(each).sum(0) for each in zip(*parts, strict=True)]


def _pool(size: int) -> ThreadPoolExecutor:
    key = os.getpid(), size  # threads do not survive a fork
    if key not in _pools:
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(size, "tensor-work", initializer=torch.set_num_threads, initargs=(1,))
        everybody = threading.Barrier(size)
        list(pool.map(lambda _: everybody.wait(), range(size)))
        torch.set_num_threads(threads)  # the call in the workers also set what later threads start with
        _pools[key] = pool
    return _pools[key]
