"""Read scans in several processes of this machine; one that dies costs the scan it was reading, nothing else.

Every worker process has a thread here that hands it one case at a time, so it is known which scan a dead one was
reading. That scan is read once more in a fresh process while all others wait, because the usual killer is the kernel
that ran out of memory; if it kills that one too it becomes a :class:`Failure`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from mg3d.errors import RunFailedError
from prepro.engines.base import SCANS_IN_FLIGHT_PER_WORKER, Failure, keep_order, killed_failure, load_case
from prepro.readers.base import Case, PackedImage, Reader

ONE_THREAD_EACH = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
READY = "ready"


@dataclass(frozen=True)
class PoolEngine:
    """Several processes of this machine.

    Attributes:
        workers: number of processes; each is started when there is work for it.
    """

    workers: int

    def read(self, reader: Reader, cases: Iterable[Case]) -> Iterator[tuple[Case, PackedImage | Failure]]:
        """Yield every case with its result, in order.

        Args:
            reader: the data set; must be picklable.
            cases: what to read, taken at most two per worker ahead.

        Yields:
            the case and its result.

        Raises:
            RunFailedError: a worker process does not start.
        """
        team = _Team(reader)
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="scan-worker")

        def submit(case: Case) -> Future[PackedImage | Failure]:
            return threads.submit(team.read, case)

        try:
            window = SCANS_IN_FLIGHT_PER_WORKER * self.workers
            yield from keep_order(cases, submit, lambda _, started: started.result(), lambda: window)
        finally:
            team.close()
            threads.shutdown(wait=True, cancel_futures=True)


class _Team:
    """The worker processes, one per calling thread."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._own = threading.local()
        self._crew: set[_Worker] = set()
        self._turns = _Turns()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, case: Case) -> PackedImage | Failure:
        """Read a case in the process of the calling thread, and once more alone if that one dies."""
        with self._turns.shared():
            try:
                return self._worker().read(case)
            except (EOFError, OSError):
                self._dismiss()
        with self._turns.alone():
            try:
                return self._worker().read(case)
            except (EOFError, OSError):
                self._dismiss()
                return killed_failure(case)

    def close(self) -> None:
        """Kill every process at once; waiting readers get an error."""
        with self._lock:
            self._closed = True
            for worker in self._crew:
                worker.kill()

    def _worker(self) -> _Worker:
        worker = getattr(self._own, "worker", None)
        if worker is None:
            with self._lock:  # starting a process is not safe in two threads at once
                if self._closed:
                    raise CancelledError
                worker = self._own.worker = _Worker(self._reader)
                self._crew.add(worker)
            worker.wait_until_ready()
        return worker

    def _dismiss(self) -> None:
        with self._lock:
            worker, self._own.worker = self._own.worker, None
            self._crew.discard(worker)
            worker.kill()
            if self._closed:
                raise CancelledError


class _Worker:
    """One process that reads a scan at a time."""

    def __init__(self, reader: Reader) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, reader), name="scan-worker", daemon=True)
        with _one_thread_each():
            self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait for the imports of the process.

        Raises:
            RunFailedError: it ended before it was ready.
        """
        try:
            self._connection.recv()
        except (EOFError, OSError) as problem:
            self._process.join(1)
            message = f"a worker process ended before its first scan (exit code {self._process.exitcode})"
            raise RunFailedError(message, "see its message above; --workers 1 reads in this process") from problem

    def read(self, case: Case) -> PackedImage | Failure:
        """Hand over a case and wait.

        Raises:
            EOFError, OSError: the process died.
        """
        self._connection.send(case)
        return self._connection.recv()

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()


class _Turns:
    """Many at a time, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading = 0
        self._one_alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._one_alone)
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._one_alone)
            self._one_alone = True
            self._changed.wait_for(lambda: self._reading == 0)
        try:
            yield
        finally:
            with self._changed:
                self._one_alone = False
                self._changed.notify_all()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let a process started inside inherit settings that keep numerical libraries on one thread."""
    before = {name: os.environ.get(name) for name in ONE_THREAD_EACH}
    os.environ.update(dict.fromkeys(ONE_THREAD_EACH, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(connection: Connection, reader: Reader) -> None:
    """Run in a worker process: read what comes until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    return_memory = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    connection.send(READY)
    while True:
        try:
            connection.send(load_case(reader, connection.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        return_memory(0)  # what one large scan took must not stay with every worker


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # also returns when the parent was killed
    os._exit(1)
