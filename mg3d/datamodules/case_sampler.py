"""Orders of a benchmark's cases: class-balanced epochs for training, every case exactly once for evaluation."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datasets.seeding import sample_generator
from mg3d.datasets.volume_report import SampleIndex
from mg3d.errors import DataError


class BalancedBatchSampler(EpochBatchSampler):
    """Training batches with the same number of cases of every class: as many as the rarest class has.

    Which cases of the larger classes an epoch takes follows from (seed, epoch): another epoch takes others. The cases
    of all classes are mixed; division among processes and resuming are those of `EpochBatchSampler`.

    Args:
        classes: class of each row.
        batch_size: cases of one process.
        seed: seed of the run.
        rank: this process.
        world_size: number of processes.

    Raises:
        DataError: fewer than two classes.
    """

    def __init__(
        self, classes: Sequence[Hashable], batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        rows_of: dict[Hashable, list[int]] = {}
        for row, name in enumerate(classes):
            rows_of.setdefault(name, []).append(row)
        if len(rows_of) < 2:
            raise DataError(
                f"balance=class needs cases of two classes or more, the training cases have {len(rows_of)}",
                "check the labels and the split, or raise data_fraction",
            )
        self._rows_of = [np.asarray(rows_of[name]) for name in sorted(rows_of, key=str)]
        self.per_class = min(map(len, self._rows_of))
        epoch_rows = np.arange(self.per_class * len(self._rows_of))
        super().__init__(epoch_rows, batch_size, seed=seed, rank=rank, world_size=world_size)

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in order, the same on every process."""
        drawn = [
            rows[sample_generator(self.seed, epoch, index, "subset").permutation(len(rows))[: self.per_class]]
            for index, rows in enumerate(self._rows_of)
        ]
        rows = np.concatenate(drawn)
        return rows[sample_generator(self.seed, epoch, 0, "order").permutation(len(rows))]


class CompleteBatchSampler(EpochBatchSampler):
    """Evaluation batches: every row exactly once over all processes, in order, none added and none left out.

    Every process has the same number of batches, as collective operations need; the last ones may differ in length by
    one row, and a process may have an empty one.

    Args:
        num_rows: number of rows.
        batch_size: cases of one process.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, num_rows: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(np.arange(num_rows), batch_size, shuffle=False, drop_last=False)
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.global_batch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[SampleIndex]]:
        """Yield this process' batches from batch ``start`` on."""
        for k in range(start, len(self)):
            together = self.rows[k * self.global_batch : (k + 1) * self.global_batch]
            yield [SampleIndex(int(row), epoch) for row in together[self.rank :: self.world_size]]
