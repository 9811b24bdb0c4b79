"""Read scans in this process or in several, and hand them on in order with bounded memory."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from mg3d.errors import MG3DError, RunFailedError
from prepro.readers.base import Case, PackedImage, Reader

SCANS_IN_FLIGHT_PER_WORKER = 2


@dataclass(frozen=True)
class Failure:
    """A scan that could not be used: what, how to mend it, and the file."""

    message: str
    remedy: str
    path: str


def load_case(reader: Reader, case: Case) -> PackedImage | Failure:
    """Load one case; a bad scan comes back as a value, never as an exception.

    Args:
        reader: the data set.
        case: one of its cases.

    Returns:
        the packed image or the reason against it.
    """
    path = str(case.source[0])
    try:
        return reader.load(case)
    except MG3DError as problem:
        return Failure(problem.message, problem.remedy, path)
    except MemoryError:
        return Failure("not enough memory to read it", "lower --workers or --max-volume-gib", path)
    except (OSError, ValueError, ArithmeticError, LookupError) as problem:
        return Failure(f"{type(problem).__name__}: {problem}", "look at the file", path)


def load_in_order(reader: Reader, cases: list[Case], workers: int) -> Iterator[tuple[Case, PackedImage | Failure]]:
    """Yield every case with its image, in the given order.

    Args:
        reader: the data set.
        cases: what to read.
        workers: number of processes; 1 or less reads in this one.

    Yields:
        the case and its result.

    Raises:
        RunFailedError: a worker was killed.
    """
    if workers <= 1:
        for case in cases:
            yield case, load_case(reader, case)
        return
    pending: deque[tuple[Case, Future[PackedImage | Failure]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for case in cases:
            pending.append((case, pool.submit(load_case, reader, case)))
            if len(pending) >= SCANS_IN_FLIGHT_PER_WORKER * workers:
                yield _next(pending)
        while pending:
            yield _next(pending)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(pending: deque[tuple[Case, Future[PackedImage | Failure]]]) -> tuple[Case, PackedImage | Failure]:
    case, future = pending.popleft()
    try:
        return case, future.result()
    except BrokenProcessPool as problem:
        message = f"a worker process was killed near case {case.image_id}"
        raise RunFailedError(message, "often out of memory: lower --workers") from problem
