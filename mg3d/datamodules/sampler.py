"""Order of the studies: seeded by epoch, divided among processes, resumable at any batch.

Global batch k of an epoch is ``order[k*N*b : (k+1)*N*b]`` for N processes of b studies; process r takes its r-th part.
So N processes with b studies see, together, exactly what one process with N*b studies sees.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from mg3d.datasets.seeding import sample_generator
from mg3d.datasets.volume_report import SampleIndex
from mg3d.errors import DataError

_LOG = logging.getLogger(__name__)


def seeded_subset(num_rows: int, fraction: float, seed: int) -> np.ndarray:
    """Return sorted row numbers: ``round(num_rows * fraction)`` of them, at least one, chosen by the seed.

    Raises:
        ValueError: fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"data_frac must be in (0, 1], got {fraction}")
    order = sample_generator(seed, 0, 0, "subset").permutation(num_rows)
    return np.sort(order[: max(1, round(num_rows * fraction))])


class EpochBatchSampler:
    """Batches of :class:`~mg3d.datasets.volume_report.SampleIndex` for one process.

    A remainder that does not fill a global batch is left out with ``drop_last`` (training), unless it is all there is;
    otherwise it forms a shorter batch of equal length on every process, and the at most N - 1 rows that cannot be
    divided are left out. Every process thus has the same number of equally long batches, as collective operations need,
    and no study is counted twice.

    Args:
        rows: row numbers to draw from.
        batch_size: studies of one process, b.
        seed: seed of the run.
        shuffle: permute the rows anew each epoch.
        drop_last: leave an incomplete global batch out.
        rank: this process.
        world_size: number of processes, N.

    Raises:
        ValueError: sizes out of range.
        DataError: fewer rows than processes.
    """

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"need batch_size >= 1 and 0 <= rank < world_size, got {batch_size}, {rank}, {world_size}")
        if len(rows) < world_size:
            raise DataError(f"{len(rows)} studies for {world_size} processes", "use fewer processes or more studies")
        self.rows = np.asarray(rows, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self._full, remainder = divmod(len(self.rows), self.global_batch)
        self._last = 0 if drop_last and self._full else remainder // world_size
        left_out = remainder - self._last * world_size
        if left_out and not shuffle:
            _LOG.warning("%d of %d studies cannot be divided among %d processes", left_out, len(rows), world_size)

    @property
    def global_batch(self) -> int:
        """Studies of one step over all processes."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        return self._full + (1 if self._last else 0)

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in order, the same on every process."""
        if not self.shuffle:
            return self.rows
        return self.rows[sample_generator(self.seed, epoch, 0, "order").permutation(len(self.rows))]

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[SampleIndex]]:
        """Yield this process' batches of an epoch from batch ``start`` on; skipped batches cost nothing."""
        order = self.order(epoch)
        for k in range(start, len(self)):
            size = self.batch_size if k < self._full else self._last
            first = k * self.global_batch + self.rank * size
            yield [SampleIndex(int(row), epoch) for row in order[first : first + size]]
