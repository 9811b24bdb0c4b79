"""Read scans in this very process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prepro.engines.base import Failure, load_case
from prepro.readers.base import Case, PackedImage, Reader


@dataclass(frozen=True)
class LocalEngine:
    """One scan after the other, no other process involved."""

    def read(self, reader: Reader, cases: Iterable[Case]) -> Iterator[tuple[Case, PackedImage | Failure]]:
        """Yield every case with its result, in order.

        Args:
            reader: the data set.
            cases: what to read.

        Yields:
            the case and its result.
        """
        for case in cases:
            yield case, load_case(reader, case)
