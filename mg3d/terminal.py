"""Printing on any terminal: letters that it lacks as escapes, and nothing in a text that would steer it.

File names, headers of scans, cells of tables and reports come from others. An escape sequence, a carriage return or a
mark that turns the direction of writing could hide or forge what the user reads, so all of them are shown as escapes.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from typing import Any

__all__ = ["neutral", "one_line", "tolerate_any_encoding"]

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_OF_BARS = r"\A\r(?: *\r\Z)?|\A(?:\x1b\[A)+\Z|(?<=\n)(?:\x1b\[A)+\Z"
"""A progress bar goes back to the start of its line, blanks it, and goes up again from further lines."""
_BARS = re.compile(rf"({_OF_BARS})|([^\r\x1b]+|.)", re.DOTALL)
_BARS_AND_COLOURS = re.compile(rf"({_OF_BARS}|\x1b\[[0-9;]{{0,8}}m)|([^\r\x1b]+|.)", re.DOTALL)


def neutral(text: str) -> str:
    """Return the text with every control character but line feed and tabulator as a JSON escape.

    A line of JSON stays one.
    """
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Return the text as :func:`neutral` does, line feeds and tabulators included."""
    return neutral(text).replace("\n", "\\u000a").replace("\t", "\\u0009")


class _NeutralRecord(logging.LogRecord):
    """A log record whose message cannot steer the terminal."""

    def getMessage(self) -> str:  # noqa: N802 - the name is logging's
        """The message with its arguments."""
        return neutral(super().getMessage())


def tolerate_any_encoding(*, colours: bool = False) -> None:
    """Let all output and log lines pass :func:`neutral`, and print letters that the terminal lacks as escapes.

    Args:
        colours: leave colour codes alone.
    """
    logging.setLogRecordFactory(_NeutralRecord)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            _neutralise(stream, _BARS_AND_COLOURS if colours else _BARS)


def _neutralise(stream: Any, kept: re.Pattern[str]) -> None:
    if getattr(stream, "passes_neutral", False):
        return
    write = stream.write

    def write_neutral(text: str) -> int:
        shown = "".join(own or neutral(other) for own, other in kept.findall(text))
        write(shown)
        return len(text)

    stream.write, stream.passes_neutral = write_neutral, True
