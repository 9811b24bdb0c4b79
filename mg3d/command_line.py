"""What the command lines share: refusals of two lines, whole numbers, and exit codes for what may go wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mg3d.errors import MG3DError
from mg3d.terminal import one_line, tolerate_any_encoding

INTERRUPTED = 130
MAX_LINES = 5
MAX_CHARACTERS = 400


class Parser(argparse.ArgumentParser):
    """A parser that refuses in two lines, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with exit code 2."""
        self.exit(2, f"error: {one_line(message)}\n  mend: see {self.prog} --help\n")


def refusal_text(error: MG3DError) -> str:
    """An error as at most ``MAX_LINES`` lines that end with the mend."""
    lines = [line[:MAX_CHARACTERS] for line in f"error: {error}".splitlines() if line.strip()]
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], lines[-1]])


def natural(text: str) -> int:
    """Return a whole number of at least 0.

    Raises:
        ValueError: it is none.
    """
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def exit_code_of(work: Callable[[], int], *, disk_code: int, disk_remedy: str, interrupted: str) -> int:
    """Run a command and turn what it raises into a short message.

    Args:
        work: the command; returns its exit code.
        disk_code: exit code when the operating system refuses a file.
        disk_remedy: what to do then.
        interrupted: what to say after Ctrl-C.

    Returns:
        the exit code of the process.
    """
    tolerate_any_encoding()
    try:
        return work()
    except MG3DError as problem:
        sys.stderr.write(refusal_text(problem) + "\n")
        return problem.exit_code
    except OSError as problem:
        sys.stderr.write(f"error: {one_line(str(problem))}\n  mend: {disk_remedy}\n")
        return disk_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return INTERRUPTED


def print_json_line(figures: Mapping[str, Any]) -> int:
    """Print the one line that programs read, and return the exit code of a command that went well.

    Args:
        figures: of the command, in plain types.
    """
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0
