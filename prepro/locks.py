"""Locks between processes that share an output folder; the kernel frees them when their process dies."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger(__name__)


class FileLock:
    """A lock file with the host and process id of its holder.

    On a file system without locks every request is granted after one warning.

    Args:
        path: the lock file; made when needed, removed by the last holder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def acquire(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Take the lock.

        Args:
            shared: with other shared holders instead of alone.
            wait: until it is free.

        Returns:
            whether it was taken.
        """
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, mode)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError as problem:
                logger.warning("%s: no locks here (%s): start no second run", self.path.parent, problem.strerror)
            if self._is_current(descriptor):
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # its last holder removed it meanwhile

    def share(self) -> None:
        """Let other shared holders in, after :meth:`acquire` alone."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def sign(self, text: str = "") -> None:
        """Write host, process id and a text for whoever finds the lock taken."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{socket.gethostname()} {os.getpid()} {text}\n".encode(), 0)

    def owner(self) -> str:
        """Return ``host X, process N`` of the holder, as far as known."""
        words = self._signature()
        return f"host {words[0]}, process {words[1]}" if len(words) >= 2 else "unknown"

    def text(self) -> str:
        """Return the text of :meth:`sign`."""
        words = self._signature()
        return words[2] if len(words) >= 3 else ""

    def release(self) -> None:
        """Give the lock back; harmless without one."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _signature(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8").split()
        except OSError:
            return []

    def _is_current(self, descriptor: int) -> bool:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino)
