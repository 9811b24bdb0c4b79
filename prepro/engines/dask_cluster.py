"""Read scans on a Dask cluster, possibly on other machines that see the same files under the same paths.

The reader travels once to every worker, also to those that join or restart later, in a worker plugin that first makes
sure that the worker has the same code and sees the data; a worker that does not is refused. A scan whose workers keep
dying is read once more with nothing beside it, because Dask blames every scan a dead worker held.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d.errors import EnvironmentProblem, MG3DError, RunFailedError
from prepro.engines import remote
from prepro.engines.base import SCANS_IN_FLIGHT_PER_WORKER, Failure, keep_order, killed_failure
from prepro.readers.base import Case, PackedImage, Reader

if TYPE_CHECKING:
    from distributed import Client, Future, WorkerPlugin

CONNECT_S = 5
FIRST_WORKER_S = 60
LOOK_AGAIN_S = 10
ATTEMPTS_AFTER_ERRORS = 2


@dataclass(frozen=True)
class DaskEngine:
    """A running Dask cluster.

    Attributes:
        scheduler: ``tcp://host:port`` or the path of the file the scheduler wrote.
    """

    scheduler: str

    def check(self) -> None:
        """Make sure that the scheduler answers.

        Raises:
            EnvironmentProblem: Dask is not installed, or nothing answers.
        """
        with self._client():
            pass

    def read(self, reader: Reader, cases: Iterable[Case]) -> Iterator[tuple[Case, PackedImage | Failure]]:
        """Yield every case with its result, in order.

        Args:
            reader: the data set; must be picklable and name files by absolute paths.
            cases: what to read, taken at most two per worker thread ahead.

        Yields:
            the case and its result.

        Raises:
            EnvironmentProblem: no scheduler, no worker, other code there, or the files are not visible there.
            RunFailedError: the cluster was lost on the way.
        """
        ahead = iter(cases)
        first = next(ahead, None)
        if first is None:
            return
        with self._client() as client, closing(_Crowd(client, self._address())) as crowd:
            crowd.introduce(reader, first)
            yield from keep_order(chain([first], ahead), crowd.submit, crowd.collect, crowd.window)

    @contextmanager
    def _client(self) -> Iterator[Client]:
        if importlib.util.find_spec("distributed") is None:
            raise EnvironmentProblem(
                "--scheduler needs Dask, which is not installed", "pip install 'dask[distributed]'"
            )
        from distributed import Client

        address = self._address()
        mend = f"start one with: dask scheduler; its workers with: dask worker {address} --nthreads 1"
        with _quiet("distributed.comm.core", "distributed.client"):
            try:
                client = Client(address, timeout=CONNECT_S, set_as_default=False)
            except (OSError, ValueError, TypeError) as problem:
                raise EnvironmentProblem(f"no Dask scheduler answers at {address}", mend) from problem
        with client:
            yield client

    def _address(self) -> str:
        path = Path(self.scheduler)
        if "://" in self.scheduler or (":" in self.scheduler and not path.exists()):
            return self.scheduler
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            message = f"{self.scheduler} is neither an address nor the file of a Dask scheduler"
            raise EnvironmentProblem(
                message, "give tcp://host:port, or the --scheduler-file of dask scheduler"
            ) from problem


class _Crowd:
    """The workers of a cluster, as far as one run uses them."""

    def __init__(self, client: Client, address: str) -> None:
        self._client = client
        self._address = address
        self._run = f"mg3d-{uuid.uuid4().hex[:12]}"
        self._started: set[Future] = set()
        self._plugins: list[str] = []
        self._counted = -float("inf")
        self._threads = 1

    def introduce(self, reader: Reader, first: Case) -> None:
        """Bring the reader to all workers, present and future, after checking each.

        Args:
            reader: the data set.
            first: a case whose file must be visible to the workers if it is visible here.

        Raises:
            EnvironmentProblem: no worker, or one that cannot do the job.
        """
        self._await_worker(EnvironmentProblem)
        path = first.source[0].absolute() if first.source else Path("/")
        place = path if path.exists() else next(folder for folder in path.parents if folder.exists())
        self._register("check", _check_plugin(remote.VERSIONS, str(place)))
        self._register("reader", _reader_plugin(self._run, reader))

    def submit(self, case: Case) -> Future:
        """Start reading a case.

        Raises:
            RunFailedError: the cluster was lost.
        """
        absolute = replace(case, source=tuple(path.absolute() for path in case.source))
        key = f"read-scan-{uuid.uuid4().hex}"
        with _losses_told():
            started = self._client.submit(
                remote.read_case, self._run, absolute, key=key, pure=False, retries=ATTEMPTS_AFTER_ERRORS
            )
        self._started.add(started)
        return started

    def collect(self, case: Case, started: Future) -> PackedImage | Failure:
        """Wait for a case; read it once more, alone, when its workers died.

        Raises:
            RunFailedError: the cluster was lost.
        """
        from distributed import KilledWorker

        try:
            return self._result(started)
        except KilledWorker:
            self._wait_until_idle()
        try:
            return self._result(self.submit(case))
        except KilledWorker:
            return killed_failure(case)

    def window(self) -> int:
        """Scans to have in flight: two per worker thread; clusters grow and shrink, so it is looked up now and then."""
        if time.monotonic() - self._counted > LOOK_AGAIN_S:
            with _losses_told():
                self._threads = max(1, sum(self._client.nthreads().values()))
            self._counted = time.monotonic()
        return SCANS_IN_FLIGHT_PER_WORKER * self._threads

    def close(self) -> None:
        """Take back what was not collected, and the reader."""
        with suppress(Exception):  # the cluster may be gone
            self._client.cancel(list(self._started), force=True)
            for name in self._plugins:
                self._client.unregister_worker_plugin(name)

    def _register(self, kind: str, plugin: WorkerPlugin) -> None:
        name = f"{self._run}-{kind}"
        self._plugins.append(name)
        try:
            self._client.register_plugin(plugin, name=name)
        except Exception as problem:  # whatever a worker ran into comes back as it was raised there
            message = f"a Dask worker cannot read for this run: {problem}"
            remedy = f"start the workers on machines that see the data and {remote.ROOT}, after the last change of it"
            raise EnvironmentProblem(message, remedy) from problem

    def _result(self, started: Future) -> Any:
        try:
            with _losses_told():
                while True:
                    with suppress(TimeoutError):
                        return started.result(timeout=LOOK_AGAIN_S)
                    self._await_worker(RunFailedError)
        finally:
            self._started.discard(started)

    def _wait_until_idle(self) -> None:
        from distributed import wait

        with _losses_told():
            while self._started:
                with suppress(TimeoutError):
                    wait(list(self._started), timeout=LOOK_AGAIN_S)
                    break
                self._await_worker(RunFailedError)

    def _await_worker(self, error: type[MG3DError]) -> None:
        try:
            self._client.wait_for_workers(1, timeout=FIRST_WORKER_S)
        except TimeoutError as problem:
            message = f"the Dask scheduler at {self._address} has had no worker for {FIRST_WORKER_S} s"
            raise error(message, f"start some: dask worker {self._address} --nthreads 1") from problem


def _check_plugin(versions: dict[str, str], place: str) -> WorkerPlugin:
    """Return what refuses a worker with other code, or one that does not see a file or folder.

    The class is local so that it travels by value: a worker may not be able to import it before it ran.
    """
    from distributed import WorkerPlugin

    root = str(remote.ROOT)

    class Check(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            import sys

            if root not in sys.path:
                sys.path.insert(0, root)
            from prepro.engines.remote import difference

            if other := difference(versions):
                raise RuntimeError(f"{worker.address} has {other}")
            if not Path(place).exists():
                raise FileNotFoundError(f"{worker.address} does not see {place}")

    return Check()


def _reader_plugin(run: str, reader: Reader) -> WorkerPlugin:
    """Return what keeps the reader of a run in every worker process."""
    from distributed import WorkerPlugin

    class Bring(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            from prepro.engines.remote import READERS

            READERS[run] = reader

        def teardown(self, worker: Any) -> None:
            from prepro.engines.remote import READERS

            READERS.pop(run, None)

    return Bring()


@contextmanager
def _losses_told() -> Iterator[None]:
    try:
        yield
    except (CancelledError, OSError) as problem:
        raise RunFailedError(f"the Dask cluster was lost: {problem}", "start it and run the same command") from problem


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep a library from telling at length what one line of ours says."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
