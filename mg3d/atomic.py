"""The one way to write a file or folder: under a temporary name in the same folder, renamed when it is whole.

A temporary name holds host and process of its writer (``.NAME.HOST-PID-TOKEN.tmp``) and is locked while it is filled,
so that what a killed writer left is told from what a living one is writing, on this machine and on others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from mg3d.errors import MG3DError, OutputError

__all__ = [
    "FULL",
    "atomic_folder",
    "atomic_path",
    "check_room",
    "is_abandoned",
    "is_special",
    "process_lives",
    "readable_size",
    "remove_abandoned",
    "sync_directory",
    "this_host",
    "write_text_atomically",
    "writing",
]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that say: no room."""
FOREIGN_SECONDS = 24 * 3600.0
"""Age at which the temporary file of a writer that cannot be asked (another host) counts as left behind."""
REMEDY = "free some space, or choose another place that can be written"
_NAME_BYTES = 255
_TEMPORARY = re.compile(r"^\.(?P<stem>.+)\.(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp(\.\w+)*$", re.DOTALL)
_TEMPORARY_OF_OLD = re.compile(r"^\..+\.tmp(\.\w+)*$", re.DOTALL)
_HIDDEN_BY_LIBRARIES = re.compile(r"PytorchStreamWriter failed|unexpected pos|os error (\d+)")


def this_host() -> str:
    """Name of this machine, in letters that a file name and one word of a lock can hold."""
    return re.sub(r"\W+", "_", socket.gethostname())[:40] or "unknown"


def process_lives(pid: int) -> bool:
    """Whether a process of this machine has the number (another one may have taken it over) and has not ended."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    try:  # ended, but not yet asked for by its parent
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in "ZX"


def is_special(path: Path) -> bool:
    """Whether something is there that no file may replace: a terminal, a pipe, ``/dev/null``."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def sync_directory(folder: Path) -> None:
    """Make a rename in ``folder`` durable (fsync of the directory)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_size(count: float) -> str:
    """Return bytes as text with a unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def _failed_write(error: Exception, path: Path, remedy: str, needed: str) -> OutputError | None:
    """The message of a refused write, None for another kind of error."""
    hidden = _HIDDEN_BY_LIBRARIES.search(str(error))
    if isinstance(error, OSError):
        code = error.errno or errno.ENOSPC  # NumPy and Pillow give no number when a file takes less than they write
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        ours = not names or any(_belongs(name, path) for name in names)
        if isinstance(error, BrokenPipeError) or not (ours or code in FULL):
            return None
        path = path if ours else Path(names[-1])
    elif isinstance(error, MG3DError) or hidden is None:
        return None
    else:  # torch and safetensors put another error in the place of the operating system's
        code = int(hidden[1] or errno.ENOSPC)
    room = f" ({needed}{readable_size(_free(path))} free)" if code in FULL else ""
    return OutputError(path, f"{os.strerror(code)}{room}", remedy)


def _belongs(name: str, path: Path) -> bool:
    return Path(name).absolute().is_relative_to(path.absolute().parent)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return 0


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in files if file.is_file())
    return 0


@contextlib.contextmanager
def writing(path: Path, remedy: str = REMEDY, *, needed: int = 0, filled: Path | None = None) -> Iterator[None]:
    """Turn a refused write into one message with the needed and the free bytes.

    Args:
        path: the output, for the message.
        remedy: what to do.
        needed: bytes, as far as known.
        filled: the file or folder that is being filled: at least its size is needed.

    Raises:
        OutputError: the operating system refused, or a library says so in other terms.
    """
    try:
        yield
    except OutputError as error:
        if filled is None or not Path(error.path).is_relative_to(filled):
            raise
        raise OutputError(path, error.reason, remedy) from error  # a file of the temporary folder
    except Exception as error:
        least = _size(filled or path)
        known = f"about {readable_size(needed)}" if needed else f"more than {readable_size(least)}" if least else ""
        failed = _failed_write(error, path, remedy, f"{known} needed, " if known else "")
        if failed is None:
            raise
        raise failed from error


def check_room(path: Path, needed: int, remedy: str = REMEDY) -> None:
    """Raise OutputError when fewer than ``needed`` bytes are free where ``path`` is to be written."""
    with writing(path, remedy, needed=needed):
        if _free(path) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def atomic_path(
    path: Path, remedy: str = REMEDY, *, needed: int = 0, ending: str = "", mode: int = 0o666
) -> Iterator[Path]:
    """Give an empty file to fill; it becomes ``path`` when the block ends well and vanishes when it does not.

    Args:
        path: the final name; what is no regular file (a terminal, a pipe) is written as it is.
        remedy: what to do when the disk refuses.
        needed: bytes, as far as known; checked before anything is written.
        ending: end of the temporary name, for writers that go by it.
        mode: permissions, less the process's mask.

    Yields:
        the temporary name.

    Raises:
        OutputError: it cannot be written; nothing is left behind, and an older file stays as it was.
    """
    if is_special(path):
        with writing(path, remedy):
            yield path
        return
    check_room(path, needed, remedy)
    temporary = _temporary_name(path, ending)
    try:
        with writing(path, remedy, needed=needed, filled=temporary):
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            try:
                _lock(descriptor)
                yield temporary
                _sync(temporary)
                os.replace(temporary, path)
            finally:
                os.close(descriptor)
            sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path, remedy: str = REMEDY, *, needed: int = 0) -> Iterator[Path]:
    """Give an empty folder to fill; it takes the place of ``path`` (and of a folder there) when the block ends well.

    Args:
        path: the final name; missing parents are made.
        remedy: what to do when the disk refuses.
        needed: bytes, as far as known; checked before anything is written.

    Yields:
        the temporary folder.

    Raises:
        OutputError: it cannot be written; nothing is left behind, and an older folder stays as it was.
    """
    check_room(path, needed, remedy)
    temporary, old = _temporary_name(path), _temporary_name(path)
    try:
        with writing(path, remedy, needed=needed, filled=temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                _lock(descriptor)
                yield temporary
                _put_in_place(temporary, path, old)
            finally:
                os.close(descriptor)
            sync_directory(path.parent)
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path, old: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(old, path)
        raise


def write_text_atomically(path: Path, text: str, remedy: str = REMEDY) -> None:
    """Write a text file in UTF-8, whole or not at all; lone surrogates become question marks.

    Raises:
        OutputError: the disk is full or read-only; nothing is left behind.
    """
    with atomic_path(path, remedy) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="")


def _temporary_name(path: Path, ending: str = "") -> Path:
    tail = f".{this_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp{ending}"
    room = _NAME_BYTES - 1 - len(tail)
    return path.with_name(f".{os.fsencode(path.name)[:room].decode('utf-8', 'ignore')}{tail}")


def _lock(descriptor: int) -> bool:
    """Mark a temporary as being filled; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)  # another one than ours: a library may have put a new file there
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_abandoned(temporary: Path) -> bool:
    """Whether the writer of a temporary file or folder is provably gone.

    It is while the lock on it is free and its process is one of this host that has ended. Where that cannot be known
    (another host, no locks, names of earlier versions) only after ``FOREIGN_SECONDS`` without a change.
    """
    found = _TEMPORARY.match(temporary.name)
    try:
        free = _is_free(temporary)
        age = time.time() - max(temporary.lstat().st_mtime, temporary.lstat().st_ctime)
    except OSError:
        return False
    if free is False:
        return False
    gone = found is not None and found["host"] == this_host() and not process_lives(int(found["pid"]))
    return (free is True and gone) or age > FOREIGN_SECONDS


def _is_free(temporary: Path) -> bool | None:
    """Whether nobody holds the lock; None where the file system cannot tell."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return True


def remove_abandoned(folder: Path, name: str = "") -> list[Path]:
    """Remove what writers left in a folder who are provably gone.

    Args:
        folder: where to look, not below.
        name: only temporaries of this final name; all when empty.

    Returns:
        what was removed.
    """
    removed = []
    for entry in folder.glob(".*.tmp*"):
        found = _TEMPORARY.match(entry.name)
        if found is None and not _TEMPORARY_OF_OLD.match(entry.name):
            continue
        if name and not (name.startswith(found["stem"]) if found else entry.name.startswith(f".{name}.")):
            continue
        if not is_abandoned(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()
        removed.append(entry)
    return removed
