"""The few error classes a user of the project can meet; each carries the mend beside the message."""

from __future__ import annotations

import os

from mg3d.terminal import neutral, one_line


class MG3DError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what is wrong, naming the file, row or key.
        remedy: one sentence that says how to mend it.
    """

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = neutral(message)
        self.remedy = neutral(remedy)
        super().__init__(f"{self.message}\n  mend: {self.remedy}" if remedy else self.message)


class ConfigError(MG3DError):
    """A config key is unknown, dead, of the wrong type or out of range."""


class DataError(MG3DError):
    """A data file or a sample cannot be used.

    Args:
        message: what is wrong.
        remedy: how to mend it.
        case_id: identifier of the sample, when one is known.
        path: the file concerned, when one is known.
    """

    def __init__(self, message: str, remedy: str = "", *, case_id: str = "", path: str = "") -> None:
        self.case_id = case_id
        self.path = path
        place = ", ".join(one_line(part) for part in (path, f"case {case_id}" if case_id else "") if part)
        super().__init__(f"{place}: {message}" if place else message, remedy)


class CheckpointError(MG3DError):
    """A weights file is damaged, unsafe, or does not fit the model."""


class EnvironmentProblem(MG3DError):  # noqa: N818 - reads better than EnvironmentProblemError
    """Something outside the project is missing: a tokenizer, a package, disk space."""


class RunFailedError(MG3DError):
    """A run started well and failed on the way (for example a non-finite loss)."""

    exit_code = 1


class OutputError(RunFailedError):
    """An output cannot be written: no room, no permission. Never the fault of an input that is read meanwhile.

    Args:
        path: the output.
        reason: of the operating system.
        remedy: how to mend it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        super().__init__(f"cannot write {one_line(self.path)}: {reason}", remedy)

    def __reduce__(self) -> tuple[type[OutputError], tuple[str, str, str]]:
        """Survive the way from a worker process."""
        return type(self), (self.path, self.reason, self.remedy)
