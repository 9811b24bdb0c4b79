"""ITK in a child process: a file that crashes it, hangs it or swells it becomes an error that names the file.

SimpleITK is never imported into a process that reads scans. The child (:mod:`mg3d.scans.itk_child`) is started when
first needed, answers one request after the other, and ends when its parent does. Every process has its own; one
inherited through a fork is not used.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from mg3d.errors import DataError
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

LENGTHS = struct.Struct("<QQ")  # as in the child's program
PROGRAM = Path(__file__).with_name("itk_child.py")
SECONDS = 120
GRACE_SECONDS = 5
BASE_BYTES = 512 << 20
CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 24
TOO_LONG = "took too long"


class _Died(Exception):  # noqa: N818 - the child's end, not an error of this program
    """The child ended, or did not answer in time, in the middle of a request."""


class _Child:
    """One running child process."""

    def __init__(self) -> None:
        environment = os.environ | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        self._requests, self._replies = cast("tuple[IO[bytes], ...]", (self._process.stdin, self._process.stdout))

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytearray]:
        deadline = time.monotonic() + request["seconds"] + GRACE_SECONDS
        text = json.dumps(request).encode()
        try:
            for part in (LENGTHS.pack(len(text), len(payload)) + text, payload):
                view = memoryview(part)
                while view:
                    view = view[self._requests.write(view) :]
        except OSError:
            raise _Died(self._end()) from None
        first, second = LENGTHS.unpack(self._read(LENGTHS.size, deadline))
        if first > MAX_TEXT_BYTES:
            raise _Died("answered nonsense")
        return json.loads(bytes(self._read(first, deadline))), self._read(second, deadline)

    def _read(self, count: int, deadline: float) -> bytearray:
        data = bytearray(count)
        view, filled = memoryview(data), 0
        with selectors.DefaultSelector() as ready:
            ready.register(self._replies, selectors.EVENT_READ)
            while filled < count:
                if not ready.select(max(deadline - time.monotonic(), 0)):
                    raise _Died(TOO_LONG)
                got = os.readv(self._replies.fileno(), [view[filled : filled + CHUNK_BYTES]])
                if not got:
                    raise _Died(self._end())
                filled += got
        return data

    def _end(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(GRACE_SECONDS)
            return TOO_LONG if code == -14 else f"crashed ({code})"
        return "stopped answering"

    def close(self) -> None:
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                pipe.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """In a forked process: let go of the parent's pipes, so that the child still ends with its own parent."""
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                pipe.close()
        self._process.returncode = 0  # no child of this process: nothing to wait for


def _refusal(end: _Died, path: str) -> DataError:
    return DataError(f"the library that reads this format {end} on it", DOWNLOAD_AGAIN, path=path)


class _Keeper:
    """The child of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: _Child | None = None

    def ask(self, request: dict[str, Any], payload: bytes, path: str) -> tuple[dict[str, Any], bytearray]:
        """Ask once more in a fresh child when one dies: perhaps something else killed it."""
        with self.lock:
            try:
                return self._ask(request, payload)
            except _Died as end:
                if str(end) == TOO_LONG:
                    raise _refusal(end, path) from None
            try:
                return self._ask(request, payload)
            except _Died as end:
                raise _refusal(end, path) from None

    def _ask(self, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytearray]:
        if self.child is None or not self.child.alive():
            self.stop()
            self.child = _Child()
        try:
            return self.child.ask(request, payload)
        except BaseException:  # also when interrupted: the next request must not get this one's answer
            self.stop()
            raise

    def stop(self) -> None:
        if self.child is not None:
            self.child.close()
        self.child = None


_keeper = _Keeper()


def _after_fork() -> None:
    global _keeper
    if _keeper.child is not None:
        _keeper.child.forget()
    _keeper = _Keeper()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _keeper.stop())


def ask(
    do: str, path: str, *, payload: bytes = b"", image_io: str = "", memory_bytes: int = 0, seconds: int = SECONDS
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Let the child do one thing.

    Args:
        do: ``information``, ``image`` or ``decode``, see :mod:`mg3d.scans.itk_child`.
        path: the file; for ``decode`` only for messages.
        payload: bytes to decode.
        image_io: name of the ITK reader that must accept the file.
        memory_bytes: memory it may take beyond what opening any file takes.
        seconds: time it may take.

    Returns:
        what is known of the image, and its voxels in the order of ITK's arrays (z, y, x), None without any.

    Raises:
        DataError: the file is refused, or the child crashed, hung or ran out of the memory it may take.
    """
    request: dict[str, Any] = {"do": do, "path": os.path.abspath(path), "image_io": image_io}
    request |= {"memory": BASE_BYTES + memory_bytes, "seconds": seconds}
    about, data = _keeper.ask(request, payload, path)
    if "error" in about:
        raise DataError(f"cannot be read ({_last_line(about['error'])})", DOWNLOAD_AGAIN, path=path)
    if not data:
        return about, None
    voxels = np.frombuffer(data, dtype=about["dtype"])
    tail = [about["components"]] if about["components"] > 1 else []
    return about, voxels.reshape([*about["size"][::-1], *tail])


def _last_line(text: str) -> str:
    """Return the telling last line of one of ITK's long messages, without the addresses in it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1].rpartition("): ")[2] if lines else text)[:200]
