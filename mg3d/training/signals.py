"""SIGTERM and SIGINT ask the run to save and end; a second one ends it at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from mg3d.errors import RunFailedError

log = logging.getLogger(__name__)

WATCHED = (signal.SIGTERM, signal.SIGINT)


class RunStoppedError(RunFailedError):
    """The run was asked to stop by a signal and left a checkpoint; the exit code is 128 + signal number."""

    def __init__(self, signum: int, place: str) -> None:
        self.exit_code = 128 + signum
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; {place}", "go on with resume_from=last")


class StopSignals:
    """Remembers the first stop signal; installed only while training runs.

    Attributes:
        received: number of the signal, 0 before one came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over the handlers (main thread only); whatever was there is put back by :meth:`remove`."""
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return
        for signum in WATCHED:
            self._previous[signum] = signal.signal(signum, self._handle)

    def remove(self) -> None:
        """Put the earlier handlers back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.received = signum
        log.warning("%s: saving a checkpoint after this step, then ending", signal.Signals(signum).name)
