"""What the engines share: reading one case with its mishaps as values, and the order of the results."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mg3d.errors import MG3DError
from prepro.readers.base import Case, PackedImage, Reader

SCANS_IN_FLIGHT_PER_WORKER = 2
"""One is read, one waits for its turn or for the writer."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A scan that could not be used: what, how to mend it, and the file."""

    message: str
    remedy: str
    path: str


class Engine(Protocol):
    """A place where scans are read."""

    def read(self, reader: Reader, cases: Iterable[Case]) -> Iterator[tuple[Case, PackedImage | Failure]]:
        """Yield every case with its result, in order; see :func:`load_in_order`."""


def load_in_order(
    reader: Reader, cases: Iterable[Case], engine: Engine
) -> Iterator[tuple[Case, PackedImage | Failure]]:
    """Yield every case with its image, in the given order.

    Args:
        reader: the data set.
        cases: what to read, taken only a few ahead of the results.
        engine: where to read, from :func:`prepro.engines.create_engine`.

    Yields:
        the case and its result; a scan that cannot be used comes as a :class:`Failure`.

    Raises:
        EnvironmentProblem: the workers of a cluster cannot do the job.
        RunFailedError: the engine itself broke down.
    """
    yield from engine.read(reader, cases)


def load_case(reader: Reader, case: Case) -> PackedImage | Failure:
    """Load one case; a bad scan comes back as a value, never as an exception.

    Args:
        reader: the data set.
        case: one of its cases.

    Returns:
        the packed image or the reason against it.
    """
    path = source_path(case)
    try:
        return reader.load(case)
    except MG3DError as problem:
        return Failure(problem.message, problem.remedy, path)
    except MemoryError:
        return Failure("not enough memory to read it", "lower --workers or --max-volume-gib", path)
    except Exception as problem:  # whatever a damaged file provokes in a decoder costs this scan only
        logger.debug("reading %s", case.image_id, exc_info=True)
        return Failure(f"{type(problem).__name__}: {problem}", "look at the file", path)


def killed_failure(case: Case) -> Failure:
    """Return the result of a case whose worker was killed while reading it alone."""
    message = "the worker reading it was killed (often out of memory: it was read once more, alone, and killed again)"
    remedy = "lower --max-volume-gib to refuse such scans early, or use a machine with more memory"
    return Failure(message, remedy, source_path(case))


def source_path(case: Case) -> str:
    """Return the file a message about a case names."""
    return str(case.source[0]) if case.source else ""


def keep_order(
    cases: Iterable[Case],
    submit: Callable[[Case], T],
    collect: Callable[[Case, T], PackedImage | Failure],
    window: Callable[[], int],
) -> Iterator[tuple[Case, PackedImage | Failure]]:
    """Run cases side by side and yield them one after the other.

    Args:
        cases: taken one by one, as room comes free.
        submit: starts a case and returns at once.
        collect: waits for what ``submit`` started.
        window: how many may be started and not yet yielded, at least 1.

    Yields:
        the case and its result.
    """
    pending: deque[tuple[Case, T]] = deque()
    for case in cases:
        pending.append((case, submit(case)))
        while len(pending) >= window():
            first, started = pending.popleft()
            yield first, collect(first, started)
    while pending:
        first, started = pending.popleft()
        yield first, collect(first, started)
