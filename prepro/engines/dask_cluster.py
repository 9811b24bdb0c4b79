"""Read scans on a Dask cluster, possibly on other machines that see the same files under the same paths.

Every worker is asked before the first scan, and every task asks again for those that join later, whether it has the
same code and sees the data; one that does not is refused, because its rows could differ. A scan whose workers keep
dying is read once more with nothing beside it, because Dask blames every scan a dead worker held.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
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
POLL_S = 0.2
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
        with self._client() as client, closing(_Crowd(client, self._address(), reader, first)) as crowd:
            crowd.introduce()
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

    def __init__(self, client: Client, address: str, reader: Reader, first: Case) -> None:
        path = first.source[0].absolute() if first.source else Path("/")
        place = path if path.exists() else next(folder for folder in path.parents if folder.exists())
        self._job = remote.Job(reader, remote.VERSIONS, str(place))
        self._client = client
        self._address = address
        self._started: set[Future] = set()
        self._counted = -float("inf")
        self._threads = 1

    def introduce(self) -> None:
        """Show the code to the scheduler and the workers, and ask each worker whether it can do the job.

        Raises:
            EnvironmentProblem: no worker, or one that cannot.
        """
        self._await_worker(EnvironmentProblem)
        remedy = f"start it where {remote.ROOT} and the data are visible, after the last change of the code"
        try:
            answers = self._answers(str(remote.ROOT))
        except Exception as problem:  # whatever one of them ran into comes back as it was raised there
            raise EnvironmentProblem(f"Dask: a worker cannot take part: {_first_line(problem)}", remedy) from problem
        for name, answer in answers.items():
            if answer:
                raise EnvironmentProblem(f"Dask: {name} {answer}", remedy)

    def _answers(self, root: str) -> dict[str, str]:
        """Return what speaks against the scheduler and each worker, empty where nothing does."""
        find_code = _find_code()
        self._client.register_plugin(_code_plugin(find_code, root), name=f"mg3d code in {root}")
        answers = {"the scheduler": self._client.run_on_scheduler(find_code, root), **self._client.run(find_code, root)}
        return answers if any(answers.values()) else self._client.run(remote.complaint, self._job)

    def submit(self, case: Case) -> Future:
        """Start reading a case.

        Raises:
            RunFailedError: the cluster was lost.
        """
        absolute = replace(case, source=tuple(path.absolute() for path in case.source))
        key = f"read-scan-{uuid.uuid4().hex}"
        with _losses_told():
            started = self._client.submit(
                remote.read_case, self._job, absolute, key=key, pure=False, retries=ATTEMPTS_AFTER_ERRORS
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
            return _with_paths_as_given(self._result(started), case)
        except KilledWorker:
            self._wait_until_idle()
        try:
            return _with_paths_as_given(self._result(self.submit(case)), case)
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
        """Take back what was not collected."""
        with suppress(Exception):  # the cluster may be gone
            self._client.cancel(list(self._started), force=True)

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
        looked = time.monotonic()
        while not all(started.done() for started in self._started):
            time.sleep(POLL_S)
            if time.monotonic() - looked > LOOK_AGAIN_S:
                self._await_worker(RunFailedError)
                looked = time.monotonic()

    def _await_worker(self, error: type[MG3DError]) -> None:
        try:
            self._client.wait_for_workers(1, timeout=FIRST_WORKER_S)
        except TimeoutError as problem:
            message = f"the Dask scheduler at {self._address} has had no worker for {FIRST_WORKER_S} s"
            raise error(message, f"start some: dask worker {self._address} --nthreads 1") from problem


def _with_paths_as_given(result: PackedImage | Failure, case: Case) -> PackedImage | Failure:
    """Undo in a message that paths were made absolute for the journey, so that manifests do not tell the engine."""
    if not isinstance(result, Failure) or not case.source or case.source[0].is_absolute():
        return result
    here = f"{Path.cwd()}{os.sep}"
    return replace(result, message=result.message.replace(here, ""), path=result.path.replace(here, ""))


def _find_code() -> Callable[[str], str]:
    """Return what makes the code importable; a local function, as it must travel by value before that."""

    def find_code(root: str) -> str:
        import sys

        if root not in sys.path:
            sys.path.insert(0, root)
        try:
            import prepro.engines.remote  # noqa: F401
        except ImportError as problem:
            return f"cannot import the code of {root}: {problem}"
        return ""

    return find_code


def _code_plugin(find_code: Callable[[str], str], root: str) -> WorkerPlugin:
    """Return what does the same in workers that join or restart later; it must not raise, that leaves them half up."""
    from distributed import WorkerPlugin

    class FindCode(WorkerPlugin):
        idempotent = True

        def setup(self, worker: Any) -> None:
            find_code(root)

    return FindCode()


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


@contextmanager
def _losses_told() -> Iterator[None]:
    try:
        yield
    except (CancelledError, OSError, RuntimeError) as problem:
        message = f"the Dask cluster does not do its work: {_first_line(problem)}"
        raise RunFailedError(message, "look at the logs of its workers, then run the same command again") from problem


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
