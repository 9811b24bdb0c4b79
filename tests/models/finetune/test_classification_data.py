"""Cases as samples: size, order of the axes, seeded augmentation, caches, unreadable cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_cases import SIZE, config, data, flip_and_shift, load_planted, small_splits, task, write_cases

from mg3d.datasets.classification import ClassificationDataset, fit_centre
from mg3d.datasets.volume_report import BadSample, SampleIndex
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Case, Splits

CALLS: list[str] = []


def counted(case: Case, cfg: Any) -> np.ndarray:
    CALLS.append(case.id)
    return load_planted(case, cfg) * cfg.extra.get("scale", 1.0)


def ramp(case: Case, cfg: Any) -> np.ndarray:
    """Value tells the place: z / 100 + y / 1000 + x / 10000."""
    z, y, x = np.meshgrid(np.arange(4), np.arange(6), np.arange(8), indexing="ij")
    return (z / 100 + y / 1000 + x / 10000).astype(np.float32)


def broken_shape(case: Case, cfg: Any) -> np.ndarray:
    return np.zeros((2, 2), np.float32)


def out_of_range(case: Case, cfg: Any) -> np.ndarray:
    return np.full((4, 4, 4), 255.0, np.float32)


@pytest.fixture
def splits(tmp_path: Path) -> Splits:
    return small_splits(tmp_path / "cases")


def test_a_batch_has_images_targets_and_names(tmp_path: Path, splits: Splits) -> None:
    batch = next(iter(data(config(tmp_path), task(), splits).val_dataloader()))
    assert batch["image"].shape == (4, 1, *SIZE)
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() and batch["image"].max() <= 1
    assert batch["target"].shape == (4, 1)
    assert batch["id"] == [case.id for case in splits.val[:4]]
    assert batch["patient"] == [case.patient for case in splits.val[:4]]


def test_a_class_index_is_an_integer_target(tmp_path: Path, splits: Splits) -> None:
    what = task(kind="multiclass", outputs=("no", "yes"))
    batch = next(iter(data(config(tmp_path), what, splits).test_dataloader()))
    assert batch["target"].dtype == torch.int64
    assert batch["target"].tolist() == [1, 1, 1, 0]


def test_evaluation_is_complete_ordered_and_never_augmented(tmp_path: Path, splits: Splits) -> None:
    what = task(augment=flip_and_shift)
    found = data(config(tmp_path), what, splits)
    shown = {
        name: image
        for batch in found.test_dataloader()
        for name, image in zip(batch["id"], batch["image"], strict=True)
    }
    assert list(shown) == [case.id for case in splits.test]
    assert np.array_equal(shown[splits.test[0].id][0].numpy(), load_planted(splits.test[0], None))
    plain = next(iter(found.complete_dataloader("train")))
    assert np.array_equal(plain["image"][0, 0].numpy(), load_planted(splits.train[0], None))


def test_augmentation_follows_from_seed_epoch_and_case_alone(tmp_path: Path, splits: Splits) -> None:
    what, cfg = task(augment=flip_and_shift), config(tmp_path)

    def image(cases: tuple[Case, ...], row: int, epoch: int, **keys: Any) -> np.ndarray:
        used = dataclasses.replace(cfg, **keys)
        return ClassificationDataset(cases, what, used, train=True)[SampleIndex(row, epoch)].image.numpy()

    first = image(splits.train, 3, 0)
    assert np.array_equal(first, image(splits.train, 3, 0))
    assert np.array_equal(first, image(splits.train[3:], 0, 0)), "the place in the list must not matter"
    assert not np.array_equal(first, image(splits.train, 3, 1))
    assert not np.array_equal(first, image(splits.train, 3, 0, seed=1))
    assert first.min() >= 0 and first.max() <= 1


def test_the_axis_order_permutes_what_the_network_sees(tmp_path: Path) -> None:
    case = Case("a", "a", tmp_path / "none", targets=(0,))
    what = task(load=ramp, size_dhw=(4, 6, 8))
    for order in ("zyx", "xyz", "zxy"):
        dataset = ClassificationDataset([case], what, config(tmp_path, axis_order=order), train=False)
        image = dataset[0].image[0].numpy()
        at = dict(z=1, y=2, x=3)
        assert image.shape == tuple({"z": 4, "y": 6, "x": 8}[axis] for axis in order)
        assert image[tuple(at[axis] for axis in order)] == pytest.approx(0.0123)


def test_fit_centre_cuts_and_fills_the_middle() -> None:
    plane = np.arange(512, dtype=np.float32) + 1
    array = np.broadcast_to(plane[None, :, None], (3, 512, 2))
    fitted = fit_centre(array, (5, 384, 2))
    assert fitted.shape == (5, 384, 2)
    assert fitted[2, 0, 0] == 65 and fitted[2, -1, 0] == 448, "rows 64..447"
    assert not fitted[0].any() and not fitted[-1].any()


def test_memory_keeps_and_disk_outlives_the_data_set(tmp_path: Path, splits: Splits) -> None:
    what = task(load=counted)
    for cache, reads in (("none", 4), ("memory", 2), ("disk", 1)):
        CALLS.clear()
        seen = []
        for _ in range(2):
            dataset = ClassificationDataset(splits.val, what, config(tmp_path, cache=cache), train=False)
            seen += [dataset[0].image.numpy(), dataset[0].image.numpy()]
        assert len(CALLS) == reads, cache
        assert all(np.array_equal(seen[0], other) for other in seen)


def test_the_disk_cache_notices_another_recipe_another_file_and_damage(tmp_path: Path, splits: Splits) -> None:
    what, cfg = task(load=counted), config(tmp_path, cache="disk")

    def value(used: Any) -> float:
        return float(ClassificationDataset(splits.val, what, used, train=False)[0].image.sum())

    before = value(cfg)
    darker = dataclasses.replace(cfg, extra={"scale": 0.5})
    assert value(darker) == pytest.approx(before / 2, rel=1e-4)
    for path in (tmp_path / "work" / "cache").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:200])
    assert value(cfg) == before
    np.save(splits.val[0].image, np.zeros(SIZE, np.uint8))
    assert value(cfg) == 0


def test_augmentation_never_touches_the_cache(tmp_path: Path, splits: Splits) -> None:
    def spoil(array: np.ndarray, rng: np.random.Generator, cfg: Any) -> np.ndarray:
        array *= 0
        return array

    dataset = ClassificationDataset(splits.train, task(augment=spoil), config(tmp_path, cache="memory"), train=True)
    assert dataset[0].image.max() == 0
    assert np.array_equal(dataset.array(0), load_planted(splits.train[0], None))


def test_worker_processes_read_the_same_and_fill_the_memory(tmp_path: Path, splits: Splits) -> None:
    here = data(config(tmp_path), task(augment=flip_and_shift), splits)
    there = data(config(tmp_path, num_workers=2, cache="memory"), task(augment=flip_and_shift), splits)
    pairs = list(zip(here.train_dataloader(), there.train_dataloader(), strict=True))
    assert pairs
    for left, right in pairs:
        assert left["id"] == right["id"]
        assert torch.equal(left["image"], right["image"])


def test_an_unreadable_case_stops_the_run_and_is_named(tmp_path: Path, splits: Splits) -> None:
    splits.val[1].image.write_bytes(b"no array")
    with pytest.raises(DataError, match=splits.val[1].id) as caught:
        list(data(config(tmp_path), task(), splits).val_dataloader())
    assert str(splits.val[1].image) in str(caught.value)
    assert "on_bad_sample=skip" in caught.value.remedy


def test_skipping_leaves_a_case_out_of_evaluation_and_replaces_it_in_training(tmp_path: Path, splits: Splits) -> None:
    cfg = config(tmp_path, on_bad_sample="skip", max_bad_fraction=0.5)
    splits.val[1].image.unlink()
    loader = data(cfg, task(), splits).val_dataloader()
    assert [name for batch in loader for name in batch["id"]] == [
        case.id for case in splits.val if case is not splits.val[1]
    ]
    assert list(loader.bad_rows) == [1]
    splits.train[2].image.unlink()
    dataset = ClassificationDataset(splits.train, task(), cfg, train=True)
    sample = dataset[SampleIndex(2, 0)]
    assert not isinstance(sample, BadSample)
    assert sample.case.targets == splits.train[2].targets and sample.case is not splits.train[2]
    assert [entry.row for entry in sample.bad] == [2]
    assert dataset[SampleIndex(2, 0)].case is sample.case


def test_too_many_unreadable_cases_stop_the_run(tmp_path: Path, splits: Splits) -> None:
    for case in splits.val[:3]:
        case.image.unlink()
    with pytest.raises(DataError, match="max_bad_fraction"):
        list(data(config(tmp_path, on_bad_sample="skip", max_bad_fraction=0.2), task(), splits).val_dataloader())


@pytest.mark.parametrize(("load", "words"), [(broken_shape, "shape"), (out_of_range, "255")])
def test_an_array_that_is_no_volume_in_the_unit_range_is_refused(tmp_path: Path, load: Any, words: str) -> None:
    case = Case("odd", "odd", tmp_path / "odd.npy", targets=(1,))
    with pytest.raises(DataError, match=words):
        ClassificationDataset([case], task(load=load), config(tmp_path), train=False)[0]


def test_targets_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    cases = write_cases(tmp_path / "c", 2)
    three = task(kind="multiclass", outputs=("a", "b", "c"))
    wrong = dataclasses.replace(cases[0], targets=(3,))
    with pytest.raises(DataError, match="class 3"):
        ClassificationDataset([wrong], three, config(tmp_path), train=False)
    with pytest.raises(DataError, match="2 targets"):
        ClassificationDataset([dataclasses.replace(cases[0], targets=(1, 0))], task(), config(tmp_path), train=False)
    unknown = dataclasses.replace(cases[0], targets=(float("nan"),))
    assert ClassificationDataset([unknown], task(), config(tmp_path), train=False)[0].target.tolist() == [-1]


def test_a_load_function_can_be_named(tmp_path: Path, splits: Splits) -> None:
    named = ClassificationDataset(splits.val, task(load="planted_cases:load_planted"), config(tmp_path), train=False)
    assert named[0].image.shape == (1, *SIZE)
    with pytest.raises(ConfigError, match="module:function"):
        ClassificationDataset(splits.val, task(load="planted_cases:no_such"), config(tmp_path), train=False)


def test_class_balance_shows_equal_counts(tmp_path: Path) -> None:
    cases = write_cases(tmp_path / "c", 12, positive_share=0.25)
    loaders = data(config(tmp_path, batch_size=3), task(balance="class"), Splits(cases, cases, cases))
    assert loaders.batches_per_epoch(1) == 2
    for _ in range(2):
        targets = torch.cat([batch["target"] for batch in loaders.train_dataloader()])
        assert targets.sum() == 3 and len(targets) == 6
