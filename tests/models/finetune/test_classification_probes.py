"""Frozen features: kept on disk under what they follow from, then logistic regression or nearest neighbours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_cases import SIZE, build, config, data, small_splits, task

from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Splits
from mg3d.metrics.classification import auroc
from mg3d.models.finetune.knn import knn_probabilities, neighbour_weights
from mg3d.models.finetune.probes import case_features, probe_probabilities, run_probe


@pytest.fixture
def splits(tmp_path: Path) -> Splits:
    return small_splits(tmp_path / "cases", train=16, held=4)


def two_clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 2
    return rng.standard_normal((count, 6)) + 2.0 * np.eye(6)[classes], classes


def test_neighbours_by_hand() -> None:
    train = np.array([[1.0, 0], [0, 2], [-3, 0]])
    test = np.array([[5.0, 0], [1, 1]])
    targets = np.array([[1], [0], [1]])
    one = knn_probabilities(train, targets, test, neighbours=1, temperature=1.0)
    assert one[0, 0] == 1.0
    both = knn_probabilities(train, targets, test, neighbours=2, temperature=0.5)
    assert both[0, 0] == pytest.approx(np.exp(2.0) / (np.exp(2.0) + 1.0))
    assert both[1, 0] == pytest.approx(0.5)
    classes = knn_probabilities(train, targets, test, num_classes=3, neighbours=9, temperature=0.1)
    assert classes.shape == (2, 3)
    assert classes.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert classes[:, 2].tolist() == [0.0, 0.0]


def test_unknown_neighbours_do_not_vote() -> None:
    train, targets = np.eye(3), np.array([[-1, 1], [-1, 0], [-1, -1]])
    found = knn_probabilities(train, targets, np.array([[0.0, 0.1, 1.0]]), neighbours=1)
    assert found.tolist() == [[0.5, 0.0]]


def test_weights_of_neighbours_sum_to_one_and_sharpen_with_the_temperature() -> None:
    similarity = np.array([[0.9, 0.8, 0.1]])
    soft, sharp = neighbour_weights(similarity, 2, 1.0), neighbour_weights(similarity, 2, 0.01)
    assert soft.sum() == pytest.approx(1) and soft[0, 2] == 0
    assert sharp[0, 0] > 0.999 > soft[0, 0]
    with pytest.raises(ValueError, match="temperature"):
        neighbour_weights(similarity, 2, 0.0)


@pytest.mark.parametrize("mode", ["linear_probe", "knn_probe"])
@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_a_probe_separates_two_clouds(tmp_path: Path, mode: str, kind: str) -> None:
    (train, classes), (held, truth) = two_clouds(60, 0), two_clouds(40, 1)
    what = task(kind=kind, outputs=("finding",) if kind == "binary" else ("no", "yes"))
    cfg = config(tmp_path, mode=mode, knn_neighbours=5)
    groups = np.arange(60).astype(str)
    found = probe_probabilities(cfg, what, train, classes[:, None], groups, held)
    assert found.shape == (40, len(what.outputs))
    assert 0 <= found.min() and found.max() <= 1
    assert auroc(found[:, -1], truth) > 0.85
    assert np.array_equal(found, probe_probabilities(cfg, what, train, classes[:, None], groups, held))
    if kind == "multiclass":
        assert found.sum(axis=1) == pytest.approx(np.ones(40))


def test_a_linear_probe_needs_patients_of_both_kinds(tmp_path: Path) -> None:
    train, classes = two_clouds(8, 0)
    with pytest.raises(DataError, match="knn_probe"):
        probe_probabilities(
            config(tmp_path, mode="linear_probe"), task(), train, classes[:, None], np.arange(8).astype(str), train
        )


def test_too_few_patients_are_refused_before_features_are_computed(tmp_path: Path, splits: Splits) -> None:
    cfg = config(tmp_path, mode="linear_probe")
    few = dataclasses.replace(splits, train=splits.train[4:])
    with pytest.raises(DataError, match="and without finding"):
        run_probe(build(cfg, task()), data(cfg, task(), few), cfg, task())
    assert not (tmp_path / "work" / "features").exists()


@pytest.mark.parametrize("mode", ["linear_probe", "knn_probe"])
def test_a_probe_gives_the_rows_of_a_classifier(tmp_path: Path, splits: Splits, mode: str) -> None:
    cfg = config(tmp_path, mode=mode)
    module = build(cfg, task())
    weights = [value.clone() for value in module.parameters()]
    rows = run_probe(module, data(cfg, task(), splits), cfg, task())
    assert [row["id"] for row in rows["test"]] == sorted(case.id for case in splits.test)
    assert set(rows["val"][0]) == {"id", "patient", "target", "prob_finding"}
    assert all(torch.equal(left, right) for left, right in zip(weights, module.parameters(), strict=True))


def test_features_are_computed_once_and_anew_when_weights_or_data_change(tmp_path: Path, splits: Splits) -> None:
    cfg = config(tmp_path, mode="knn_probe")
    module, loaders = build(cfg, task()), data(cfg, task(), splits)
    folder = tmp_path / "work" / "features"
    first = case_features(module, loaders, cfg, "val")
    assert len(list(folder.glob("val-*.safetensors"))) == 1
    moved = [case.image.rename(case.image.with_suffix(".away")) for case in splits.val]
    for case, place in zip(splits.val, moved, strict=True):
        place.rename(case.image)
    calls: list[int] = []
    module.features = lambda image: calls.append(len(image))  # type: ignore[assignment]
    again = case_features(module, loaders, cfg, "val")
    assert calls == [] and again.ids == first.ids and np.array_equal(again.values, first.values)
    del module.features
    with torch.no_grad():
        next(module.encoder.parameters()).add_(0.1)
    other = case_features(module, loaders, cfg, "val")
    assert not np.array_equal(other.values, first.values)
    np.save(splits.val[0].image, np.zeros(SIZE, np.uint8))
    newer = case_features(module, loaders, cfg, "val")
    place = newer.ids.index(splits.val[0].id)
    assert not np.array_equal(newer.values[place], other.values[place])
    assert len(list(folder.glob("val-*.safetensors"))) == 3


def test_a_damaged_feature_file_is_made_again(tmp_path: Path, splits: Splits) -> None:
    cfg = config(tmp_path, mode="knn_probe")
    module, loaders = build(cfg, task()), data(cfg, task(), splits)
    first = case_features(module, loaders, cfg, "test")
    path = next((tmp_path / "work" / "features").glob("test-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-40])
    assert np.array_equal(case_features(module, loaders, cfg, "test").values, first.values)


def test_features_do_not_depend_on_batch_size_head_or_mode(tmp_path: Path, splits: Splits) -> None:
    cfg = config(tmp_path, mode="knn_probe")
    first = case_features(build(cfg, task()), data(cfg, task(), splits), cfg, "val")
    one = dataclasses.replace(cfg, batch_size=1, work_dir=str(tmp_path / "other"))
    module = build(one, task(head="norm_linear"))
    other = case_features(module.train(), data(one, task(), splits), one, "val")
    assert module.training
    assert np.allclose(first.values, other.values, atol=1e-6)


def test_an_output_without_positives_has_no_probability_beside_others(tmp_path: Path) -> None:
    features, classes = two_clouds(40, 0)
    groups = np.arange(40).astype(str)
    shared = task(outputs=("often", "never"), kind="binary", class_weights=(1.0, 1.0))
    cfg = config(tmp_path, mode="linear_probe")
    targets = np.column_stack([classes, np.zeros(40, dtype=np.int64)])
    found = probe_probabilities(cfg, shared, features, targets, groups, features)
    assert np.isnan(found[:, 1]).all() and auroc(found[:, 0], classes) > 0.9
    weighted = dataclasses.replace(shared, class_weights=(20.0, 1.0))
    assert probe_probabilities(cfg, weighted, features, targets, groups, features)[:, 0].mean() > found[:, 0].mean()
    with pytest.raises(DataError, match="and without often"):
        probe_probabilities(cfg, shared, features, targets * 0, groups, features)
