"""Errors of the libraries below, told in the terms of a run."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mg3d.errors import DataError, MG3DError, RunFailedError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_WORKER_KILLED = "a worker was killed, often for memory: lower num_workers, then resume_from=last"
_WORKER_TRACE = re.compile(r"^Caught (\w+) in DataLoader worker process (\d+)\.", re.MULTILINE)
_RAISED = re.compile(r"^[\w.]*\b(?:MG3DError|DataError|EnvironmentProblem|ConfigError|CheckpointError): ", re.MULTILINE)


def unwrap_worker_error(error: MG3DError) -> MG3DError:
    """Undo the loader's wrapping: it puts a worker's whole traceback into the message of the re-raised error."""
    text = str(error)
    if not _WORKER_TRACE.search(text):
        return error
    raised = list(_RAISED.finditer(text))
    message, _, remedy = (text[raised[-1].end() :] if raised else text).strip().partition("\n  mend: ")
    plain_type = DataError if isinstance(error, DataError) else type(error)
    return plain_type(message, remedy.splitlines()[0] if remedy else "")


def _lost_worker(error: BaseException) -> bool:
    """Whether a worker ended while it handed a tensor over: then the socket breaks before torch sees the death."""
    if not isinstance(error, (EOFError, ConnectionError, FileNotFoundError)):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith("resource_sharer.py") for frame, _ in frames)


def _told(error: BaseException) -> MG3DError | None:
    if isinstance(error, MG3DError):
        return unwrap_worker_error(error)
    if _lost_worker(error):
        return RunFailedError("a DataLoader worker ended while it handed over a batch", _WORKER_KILLED)
    if isinstance(error, OSError) and error.errno in _FULL:
        place = error.filename or "the run folder"
        return RunFailedError(f"cannot write {place}: {error.strerror}", "free space or choose another log_dir")
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        first = text.splitlines()[0]
        return RunFailedError(
            first, "lower per_gpu_batchsize (batch_size keeps the rest) or gradient_checkpointing=True"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        first = next(line for line in text.splitlines() if "DataLoader worker" in line)
        return RunFailedError(first, _WORKER_KILLED)
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        first = text.splitlines()[0][:200]
        return RunFailedError(f"another process of the run ended: {first}", "mend that one, then resume_from=last")
    return None


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn the failures a user can mend into the project's errors; anything else passes unchanged."""
    try:
        yield
    except Exception as error:
        told = _told(error)
        if told is None or told is error:
            raise
        raise told from error
