"""Locks between processes that share an output; the kernel frees them when their process dies."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from mg3d.atomic import is_special, process_lives, remove_abandoned, this_host
from mg3d.errors import EnvironmentProblem

__all__ = ["FileLock", "exclusive_output"]

logger = logging.getLogger(__name__)


class FileLock:
    """A lock file with the host and process id of its holder.

    On a file system without locks every request is granted after one warning, unless a living process of this host
    has signed. Processes forked from the holder do not keep the lock alive.

    Args:
        path: the lock file; made when needed, removed by the last holder.

    Attributes:
        certain: False once a request was granted on a file system that has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.certain = True
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
                if not shared and self._is_signed_by_the_living():
                    os.close(descriptor)
                    return False
                logger.warning("%s: no locks here (%s): start no second run", self.path.parent, problem.strerror)
                self.certain = False
            if self._is_current(descriptor):
                self._descriptor = descriptor
                _HELD.add(self)
                return True
            os.close(descriptor)  # its last holder removed it meanwhile

    def share(self) -> None:
        """Let other shared holders in, after :meth:`acquire` alone."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def sign(self, text: str = "") -> None:
        """Write host, process id and a text for whoever finds the lock taken; a full disk leaves it unsigned."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{this_host()} {os.getpid()} {text}\n".encode(), 0)

    def owner(self) -> str:
        """Return ``host X, process N`` of the holder, as far as known."""
        words = self._signature()
        return f"host {words[0]}, process {words[1]}" if len(words) >= 2 else "another process"

    def text(self) -> str:
        """Return the text of :meth:`sign`."""
        words = self._signature()
        return words[2] if len(words) >= 3 else ""

    def is_held(self) -> bool:
        """Whether someone holds the lock now; nothing is made or changed."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return self._is_signed_by_the_living()
        finally:
            os.close(descriptor)
        return False

    def release(self) -> None:
        """Give the lock back; harmless without one."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink()
        self.forget()

    def survive_exec(self) -> None:
        """Keep the lock when this process becomes another program."""
        os.set_inheritable(self._descriptor, True)

    def forget(self) -> None:
        """Close the file without giving the lock back: a forked process does so, its parent still holds it."""
        _HELD.discard(self)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _signature(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").split()
        except OSError:
            return []

    def _is_signed_by_the_living(self) -> bool:
        host, pid = (*self._signature(), "", "")[:2]
        return host == this_host() and pid.isdigit() and int(pid) != os.getpid() and process_lives(int(pid))

    def _is_current(self, descriptor: int) -> bool:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino)


_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def exclusive_output(path: Path, *, wait: bool = False, what: str = "--out") -> Iterator[None]:
    """Keep other processes from writing a file or folder while the block runs, and tidy up after dead ones.

    Its folder is made when it is missing, so that a place that cannot be written is refused before any work.

    Args:
        path: the output; may not exist yet.
        wait: until its writer is done, instead of refusing.
        what: the option that names the output, for the message.

    Raises:
        EnvironmentProblem: another process writes it, or the place cannot be written.
    """
    place = Path(os.path.realpath(path))
    if is_special(place):
        yield
        return
    lock = FileLock(place.with_name(f".{place.name[:200]}.lock"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        taken = lock.acquire()
        if wait and not taken:
            logger.warning("%s is being written by %s: waiting", path, lock.owner())
            taken = lock.acquire(wait=True)
    except OSError as problem:
        message = f"cannot write in {place.parent}: {problem.strerror}"
        raise EnvironmentProblem(message, f"make it writable, or choose another {what}") from problem
    if not taken:
        message = f"{path} is being written by {lock.owner()}"
        raise EnvironmentProblem(message, f"wait for it, or choose another {what}")
    try:
        lock.sign()
        remove_abandoned(place.parent, place.name)
        yield
    finally:
        lock.release()
