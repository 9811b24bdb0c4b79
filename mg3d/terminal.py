"""Printing on any terminal."""

from __future__ import annotations

import io
import sys


def tolerate_any_encoding() -> None:
    """Print letters that the encoding of the terminal lacks (an ASCII locale) as escapes instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
