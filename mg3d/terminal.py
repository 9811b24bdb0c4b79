"""Printing on any terminal."""

from __future__ import annotations

import io
import sys


def tolerate_any_encoding() -> None:
    """Let letters that the terminal's encoding lacks (an ASCII locale) be printed as escapes instead of ending a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
