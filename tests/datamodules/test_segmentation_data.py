"""Segmentation loaders: caches that never go stale, exact resuming, every evaluated case once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segmentation_cases import AFFINES, ct_of, task, two_balls, write_case, write_volume

from mg3d.datamodules.segmentation import SegmentationDataModule
from mg3d.datasets.segmentation import CaseStore, SegmentationDataset, VolumeSample
from mg3d.datasets.volume_report import BadSample, SampleIndex
from mg3d.errors import DataError
from mg3d.finetuning.benchmark import AugmentationOptions, Case, Splits
from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config

CROPS = {"roi": (16, 16, 16), "augmentation": AugmentationOptions(flip_p=0.5, noise_p=0.5, noise_std=0.1)}


def config(tmp_path: Path, **keys: Any) -> FinetuneConfig:
    return resolve_finetune_config({"num_workers": 0, "work_dir": str(tmp_path / "work"), "num_gpus": 0, **keys})


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("cases")
    return [write_case(folder, f"c{k}", seed=k, shape=(24, 22, 18)) for k in range(5)]


def module(cfg: FinetuneConfig, cases: list[Case], **changes: Any) -> SegmentationDataModule:
    splits = Splits(tuple(cases[:3]), (cases[3],), (cases[4],))
    return SegmentationDataModule(cfg, task(**(CROPS | changes)), splits)


def test_batches_hold_crops_of_every_case_and_name_them(tmp_path: Path, cases: list[Case]) -> None:
    data = module(config(tmp_path, batch_size=3), cases)
    assert data.batches_per_epoch(1) == 1 and data.batches_per_epoch(3) == 1
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["label"].shape == (6, 1, 16, 16, 16)
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.uint8)
    assert sorted(batch["image_id"]) == ["c0", "c1", "c2"] and sorted(batch["index"]) == [0, 1, 2]
    volume = next(iter(data.val_dataloader()))
    sample = volume["sample"]
    assert volume["image"].shape[:2] == (1, 1) and volume["id"] == ["c3"]
    assert tuple(sample.stored_label.shape) == sample.grid.stored_shape == (24, 22, 18)


def test_a_resumed_epoch_gives_the_same_batches(tmp_path: Path, cases: list[Case]) -> None:
    whole = [
        batch for loader in [module(config(tmp_path), cases).train_dataloader()] for _ in range(2) for batch in loader
    ]
    assert not torch.equal(whole[0]["image"], whole[3]["image"])  # another epoch draws other crops
    loader = module(config(tmp_path), cases).train_dataloader()
    first = iter(loader)
    for _ in range(2):
        next(first)
    state = loader.state_dict()
    again = module(config(tmp_path), cases).train_dataloader()
    again.load_state_dict(state)
    rest = [*again, *again]
    assert len(rest) == 4
    for one, other in zip(rest, whole[2:], strict=True):
        assert one["image_id"] == other["image_id"]
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_loader_processes_and_caches_change_nothing(tmp_path: Path, cases: list[Case], cache: str) -> None:
    plain = list(module(config(tmp_path), cases).train_dataloader())
    for workers in (0, 1):
        cached = module(config(tmp_path, cache=cache, num_workers=workers), cases)
        for _ in range(2):
            loader = cached.train_dataloader()
            for one, other in zip(loader, plain, strict=True):
                assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def store(tmp_path: Path, stage: str = "eval", **changes: Any) -> CaseStore:
    return CaseStore(task(**changes), "disk", tmp_path / "cache", stage)


def test_every_setting_has_its_own_cached_tensor(tmp_path: Path, cases: list[Case]) -> None:
    wide, narrow = store(tmp_path), store(tmp_path, window=(-175.0, 250.0))
    first = wide.get(cases[0])
    assert not np.array_equal(first.image, narrow.get(cases[0]).image)
    assert np.array_equal(wide.get(cases[0]).image, first.image)  # read back from the file
    keys = {
        store(tmp_path, **changes).key(cases[0])
        for changes in (
            {},
            {"window": (-175.0, 250.0)},
            {"spacing_mm": (1.0, 1.0, 1.0)},
            {"orientation": "LPS"},
            {"foreground_crop": "raw"},
            {"label_map": {1: 2, 2: 1}},
        )
    }
    assert len(keys) == 6 and store(tmp_path, augmentation=AugmentationOptions(flip_p=1)).key(cases[0]) in keys


def test_training_and_evaluation_have_entries_of_their_own(tmp_path: Path, cases: list[Case]) -> None:
    train, evaluated = store(tmp_path, "train", spacing_mm=(2.0, 2.0, 2.0)), store(tmp_path, "eval")
    assert train.get(cases[0]).image.shape != evaluated.get(cases[0]).image.shape
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert {path.parent.name for path in files} == {"train", "eval"} and len(files) == 6
    assert not list((tmp_path / "cache").rglob("*.pkl")) and not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_replaced_file_and_a_damaged_entry_are_prepared_again(tmp_path: Path) -> None:
    case = write_case(tmp_path, shape=(24, 22, 18))
    first = np.array(store(tmp_path).get(case).image)
    for path in (tmp_path / "cache").rglob("*-image.npy"):
        path.write_bytes(path.read_bytes()[:300])
    assert np.array_equal(store(tmp_path).get(case).image, first)
    write_volume(case.image, ct_of(two_balls((24, 22, 18)), seed=9), AFFINES["lps"])
    os.utime(case.image, ns=(1, 1))
    assert not np.array_equal(store(tmp_path).get(case).image, first)


def test_the_grid_survives_the_disk_exactly(tmp_path: Path) -> None:
    case = write_case(tmp_path, affine=AFFINES["oblique"], shape=(24, 22, 18))
    changes = {"spacing_mm": (1.3, 1.1, 2.7), "foreground_crop": "raw"}
    plain = CaseStore(task(**changes)).get(case)
    for _ in range(2):
        kept = store(tmp_path, **changes).get(case)
        assert np.array_equal(kept.grid.affine, plain.grid.affine) and kept.grid.shape == plain.grid.shape
        assert np.array_equal(kept.image, plain.image) and np.array_equal(kept.label, plain.label)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_case_is_evaluated_once_over_all_processes(tmp_path: Path, cases: list[Case], world_size: int) -> None:
    seen: list[str] = []
    lengths = set()
    for rank in range(world_size):
        data = SegmentationDataModule(config(tmp_path), task(), Splits((), tuple(cases), ()))
        data._processes = lambda rank=rank: {"rank": rank, "world_size": world_size}  # type: ignore[method-assign]
        batches = list(data.val_dataloader())
        lengths.add(len(batches))
        seen += [name for batch in batches for name in batch["id"]]
    assert sorted(seen) == [case.id for case in cases] and len(lengths) == 1


def test_a_case_that_cannot_be_read_stops_the_run_or_is_left_out(tmp_path: Path, cases: list[Case]) -> None:
    broken = replace(cases[0], id="broken", image=tmp_path / "broken.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken"):
        SegmentationDataset([broken], task(), config(tmp_path), train=False)[0]
    skipping = config(tmp_path, on_bad_sample="skip")
    assert isinstance(SegmentationDataset([broken], task(), skipping, train=False)[0], BadSample)
    sample = SegmentationDataset([broken, cases[1]], task(), skipping, train=True)[SampleIndex(0, 0)]
    assert sample.case.id == "c1" and sample.row == 0 and sample.bad[0].row == 0
    with pytest.raises(DataError, match="without label map"):
        SegmentationDataset([replace(cases[0], label=None)], task(), skipping, train=True)


def test_an_image_without_labels_is_prepared_too(tmp_path: Path, cases: list[Case]) -> None:
    unlabelled = replace(cases[0], label=None)
    for cache in ("none", "disk"):
        sample = SegmentationDataset([unlabelled], task(), config(tmp_path, cache=cache), train=False)[0]
        assert isinstance(sample, VolumeSample) and sample.label is None and sample.stored_label is None


def test_an_empty_part_is_named(tmp_path: Path, cases: list[Case]) -> None:
    with pytest.raises(DataError, match="the val part"):
        SegmentationDataModule(config(tmp_path), task(), Splits(tuple(cases), (), ())).val_dataloader()
