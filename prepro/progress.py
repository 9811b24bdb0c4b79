"""Progress on standard error: a bar on a terminal, a line every half minute in a log file."""

from __future__ import annotations

import io
import sys

from tqdm import tqdm

LINE_EVERY_S = 30


class Progress:
    """Rate, remaining time and failures of a run.

    Args:
        total: scans to process, or bytes.
        name: what is packed.
        unit: ``scan``, or ``B`` to count bytes with :meth:`advance`.
    """

    def __init__(self, total: int, name: str, unit: str = "scan") -> None:
        terminal = sys.stderr.isatty()
        self._failed = 0
        self._bar = tqdm(
            total=total,
            desc=name,
            unit=unit,
            unit_scale=unit == "B",
            file=sys.stderr if terminal else _Lines(),
            mininterval=0.1 if terminal else LINE_EVERY_S,
            maxinterval=10 if terminal else 2 * LINE_EVERY_S,
            dynamic_ncols=terminal,
            ncols=None if terminal else 100,
            ascii=not terminal,
        )

    def skip(self, scans: int) -> None:
        """Count scans that an earlier run processed; they do not enter the rate.

        Args:
            scans: how many.
        """
        self._bar.initial += scans
        self._bar.n += scans

    def step(self, *, failed: bool = False) -> None:
        """Count one scan.

        Args:
            failed: whether it was left out.
        """
        self._failed += failed
        self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update()

    def advance(self, amount: int) -> None:
        """Count bytes.

        Args:
            amount: how many more.
        """
        self._bar.update(amount)

    def close(self) -> None:
        """Write the last state."""
        self._bar.close()


class _Lines(io.StringIO):
    """Turns the redrawing of a bar into lines."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return sys.stderr.write(f"{line}\n") if line else 0

    def flush(self) -> None:
        sys.stderr.flush()
