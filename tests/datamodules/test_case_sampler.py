"""Laws of the two orders of cases: equal classes anew each epoch; every case once in evaluation."""

from __future__ import annotations

from collections import Counter

import pytest

from mg3d.datamodules.case_sampler import BalancedBatchSampler, CompleteBatchSampler
from mg3d.errors import DataError

CLASSES = [1] * 7 + [0] * 40


def rows(sampler: BalancedBatchSampler | CompleteBatchSampler, epoch: int = 0, start: int = 0) -> list[int]:
    return [index.row for batch in sampler.batches(epoch, start) for index in batch]


def test_every_epoch_has_equal_class_counts_and_all_positives() -> None:
    for epoch in range(5):
        seen = BalancedBatchSampler(CLASSES, 2, seed=3).order(epoch)
        assert Counter(CLASSES[row] for row in seen) == {1: 7, 0: 7}
        assert len(set(seen.tolist())) == 14
        assert set(range(7)) <= set(seen.tolist())


def test_another_epoch_draws_other_negatives_and_the_same_epoch_the_same() -> None:
    first, again = BalancedBatchSampler(CLASSES, 2, seed=3), BalancedBatchSampler(CLASSES, 2, seed=3)
    assert rows(first, 0) == rows(again, 0)
    negatives = [{row for row in rows(first, epoch) if row >= 7} for epoch in range(4)]
    assert len(set(map(frozenset, negatives))) == 4
    assert rows(BalancedBatchSampler(CLASSES, 2, seed=4), 0) != rows(first, 0)
    covered = set().union(*({row for row in rows(first, epoch) if row >= 7} for epoch in range(60)))
    assert covered == set(range(7, 47))


def test_three_classes_are_balanced_to_the_rarest() -> None:
    classes = ["a"] * 9 + ["b"] * 4 + ["c"] * 30
    seen = BalancedBatchSampler(classes, 3).order(1)
    assert Counter(classes[row] for row in seen) == {"a": 4, "b": 4, "c": 4}


def test_two_processes_see_together_what_one_sees() -> None:
    one = list(BalancedBatchSampler(CLASSES, 4, seed=1).batches(2))
    parts = [list(BalancedBatchSampler(CLASSES, 2, seed=1, rank=rank, world_size=2).batches(2)) for rank in (0, 1)]
    assert one == [left + right for left, right in zip(*parts, strict=True)]


def test_resuming_at_a_batch_skips_exactly_the_batches_before() -> None:
    sampler = BalancedBatchSampler(CLASSES, 3, seed=2)
    assert rows(sampler, 1, start=2) == rows(sampler, 1)[6:]


def test_one_class_alone_cannot_be_balanced() -> None:
    with pytest.raises(DataError, match="two classes"):
        BalancedBatchSampler([1, 1, 1], 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_shows_every_case_once_in_equally_many_batches(
    num_rows: int, batch_size: int, world_size: int
) -> None:
    shards = [
        CompleteBatchSampler(num_rows, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert sorted(row for shard in shards for row in rows(shard)) == list(range(num_rows))
    assert len({len(list(shard.batches(0))) for shard in shards}) == 1
    assert all(len(list(shard.batches(0))) == len(shard) for shard in shards)
    assert all(len(batch) <= batch_size for shard in shards for batch in shard.batches(0))
