from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d.datamodules.registry import DATASETS, dataset_class
from mg3d.datamodules.sampler import EpochBatchSampler, seeded_subset
from mg3d.errors import ConfigError, DataError


def rows_of(sampler: EpochBatchSampler, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [[index.row for index in batch] for batch in sampler.batches(epoch, start)]


@given(st.integers(2, 60), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_processes_together_see_what_one_process_sees(
    count: int, batch: int, world: int, shuffle: bool, drop: bool, epoch: int
) -> None:
    if count < world:
        return
    options = {"seed": 3, "shuffle": shuffle, "drop_last": drop}
    ranks = [EpochBatchSampler(range(count), batch, rank=r, world_size=world, **options) for r in range(world)]
    one = EpochBatchSampler(range(count), batch * world, **options)
    parts = [rows_of(sampler, epoch) for sampler in ranks]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == len(ranks[0])
    together = [list(chain(*step)) for step in zip(*parts, strict=True)]
    alone = rows_of(one, epoch)
    for step, (mine, theirs) in enumerate(zip(together, alone, strict=False)):
        if len(theirs) == batch * world:
            assert mine == theirs, step
        else:
            assert set(mine) <= set(theirs) and len(theirs) - len(mine) < world
    for step in zip(*parts, strict=True):
        assert len({len(rows) for rows in step}) == 1
    seen = list(chain(*together))
    assert len(seen) == len(set(seen))
    if not drop:
        assert count - len(seen) < world


def test_epochs_and_seeds_give_other_orders_and_resume_continues() -> None:
    sampler = EpochBatchSampler(range(20), 3, seed=1)
    assert rows_of(sampler, 0) == rows_of(sampler, 0)
    assert rows_of(sampler, 0) != rows_of(sampler, 1)
    assert rows_of(sampler, 0) != rows_of(EpochBatchSampler(range(20), 3, seed=2), 0)
    for start in range(len(sampler) + 1):
        assert rows_of(sampler, 2, start) == rows_of(sampler, 2)[start:]
    assert {index.epoch for batch in sampler.batches(4) for index in batch} == {4}


def test_fewer_studies_than_a_batch_still_give_one() -> None:
    assert [len(rows) for rows in rows_of(EpochBatchSampler(range(3), 8))] == [3]
    ranks = [rows_of(EpochBatchSampler(range(5), 4, rank=r, world_size=2)) for r in range(2)]
    assert [[len(rows) for rows in part] for part in ranks] == [[2], [2]]
    with pytest.raises(DataError, match="1 studies for 2 processes"):
        EpochBatchSampler(range(1), 4, world_size=2)
    with pytest.raises(ValueError, match="rank"):
        EpochBatchSampler(range(4), 4, rank=2, world_size=2)


def test_subset_is_seeded_sorted_and_never_empty() -> None:
    part = seeded_subset(100, 0.25, seed=0)
    assert len(part) == 25 and (np.diff(part) > 0).all()
    np.testing.assert_array_equal(part, seeded_subset(100, 0.25, seed=0))
    assert set(part) != set(seeded_subset(100, 0.25, seed=1))
    assert set(part) < set(seeded_subset(100, 0.5, seed=0))
    assert len(seeded_subset(3, 0.01, seed=0)) == 1 and len(seeded_subset(7, 1.0, seed=0)) == 7
    with pytest.raises(ValueError, match="data_frac"):
        seeded_subset(3, 0.0, seed=0)


def test_unknown_dataset_names_the_nearest() -> None:
    assert {"clm_ct_rate", "clm_chest_ctrg"} <= set(DATASETS)
    with pytest.raises(ConfigError, match=r"did you mean 'clm_ct_rate'\? known: clm_chest_ctrg, clm_ct_rate, clm_own"):
        dataset_class("clm_ctrate")
