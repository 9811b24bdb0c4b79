"""A planted finding is learnt from volumes, and shuffled labels are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_cases import build, config, data, flip_and_shift, task, trainer, write_cases

from mg3d.finetuning.benchmark import Case, Splits
from mg3d.metrics.classification import auroc
from mg3d.models.finetune.case_rows import rows_to_arrays

TRAIN, HELD, EPOCHS = 96, 60, 3


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    folder = tmp_path_factory.mktemp("planted")
    held = write_cases(folder, HELD, first=5000)
    return Splits(write_cases(folder, TRAIN), held, held)


def relabelled(cases: tuple[Case, ...], seed: int, *, swap: bool) -> tuple[Case, ...]:
    """Half of the positive and half of the negative cases, drawn at random, change their label; or the other halves."""
    rng = np.random.default_rng(seed)
    found = {case.id: case for case in cases}
    for target in (0.0, 1.0):
        alike = [case for case in cases if case.targets == (target,)]
        for index in rng.permutation(len(alike))[int(swap) :: 2]:
            found[alike[index].id] = dataclasses.replace(alike[index], targets=(1.0 - target,))
    return tuple(found[case.id] for case in cases)


def held_out_auroc(folder: Path, splits: Splits) -> float:
    small = {"encoder": "unet", "feature_size": 4, "batch_size": 8, "cache": "memory"}
    cfg = config(folder, learning_rate=2e-3, max_epoch=EPOCHS, warmup_epochs=1, **small)
    what = task(augment=flip_and_shift)
    module = build(cfg, what, steps=EPOCHS * TRAIN // 8)
    runner = trainer(max_epochs=EPOCHS, limit_val_batches=0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loaders = data(cfg, what, splits)
        runner.fit(module, loaders)
        runner.test(module, loaders, verbose=False)
    finally:
        torch.set_num_threads(before)
    _, _, probabilities, targets = rows_to_arrays(module.case_rows, what)
    return auroc(probabilities[:, 0], targets[:, 0])


@pytest.mark.slow
def test_a_planted_finding_is_learnt(tmp_path: Path, splits: Splits) -> None:
    assert held_out_auroc(tmp_path, splits) > 0.9


@pytest.mark.slow
def test_shuffled_labels_are_not_learnt(tmp_path: Path, splits: Splits) -> None:
    """Shuffles and their opposites: the chance direction of a single run cancels, labels that leak would raise all."""
    chosen = [relabelled(splits.train, seed, swap=swap) for seed in (0, 1) for swap in (False, True)]
    found = [held_out_auroc(tmp_path, dataclasses.replace(splits, train=cases)) for cases in chosen]
    assert 0.35 <= np.mean(found) <= 0.65, found
