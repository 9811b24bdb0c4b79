"""Folds, blocks, shares of the training data and leaks."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Case, Splits
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.finetuning.decathlon import listed_splits, read_listing
from mg3d.finetuning.splits import (
    contiguous_blocks,
    data_fraction,
    leakage_report,
    nested_splits,
    patient_kfold,
    permuted_labels,
    refuse_leakage,
)


def cases(patients: int = 23, scans: int = 2) -> list[Case]:
    """Scans of patients in three strata."""
    return [
        Case(f"p{p:02d}-{s}", f"p{p:02d}", Path("x"), targets=(p % 3,), stratum="abc"[p % 3])
        for p in range(patients)
        for s in range(scans)
    ]


def people(part: tuple[Case, ...]) -> set[str]:
    """Patients of a part."""
    return {case.patient for case in part}


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(7, [2, 2, 1, 1, 1]), (199, [40, 40, 40, 40, 39]), (63, [13, 13, 13, 12, 12]), (126, [26, 25, 25, 25, 25])],
)
def test_blocks_follow_the_published_rule(count: int, sizes: list[int]) -> None:
    names = [f"case{k:03d}" for k in range(count)]
    blocks = contiguous_blocks(names[::-1], 5)
    assert [len(block) for block in blocks] == sizes and [name for block in blocks for name in block] == names
    with pytest.raises(DataError, match="num_folds"):
        contiguous_blocks(names[:3], 5)


FOLDS = ("Covid19_20_folds.json", "MSD_Task06_Lung_folds.json", "MSD_Task10_Colon_folds.json")


def published_lists(reference_dir: Path) -> dict[str, dict]:
    """Sizes and digests of lists that are not passed on; of folds, the digest of their numbers in order of names."""
    return json.loads((reference_dir / "splits" / "published_lists.json").read_text(encoding="utf-8"))


def digest_of_folds(folds: list[int]) -> str:
    return hashlib.sha256(json.dumps(folds, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize("name", FOLDS)
def test_the_rule_gives_the_folds_of_the_published_list(name: str, reference_dir: Path) -> None:
    record = published_lists(reference_dir)[name]
    blocks = contiguous_blocks([f"case{k:03d}" for k in range(record["cases"])], 5)
    assert digest_of_folds([k for k, block in enumerate(blocks) for _ in block]) == record["folds_sha256"]


@pytest.mark.realdata
def test_the_published_lists_are_the_recorded_ones(shared_dir: Path, reference_dir: Path) -> None:
    for name, record in published_lists(reference_dir).items():
        content = (shared_dir / "data" / "splits" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record["bytes"], record["sha256"]), name
        if name in FOLDS:
            rows = sorted(json.loads(content)["training"], key=lambda row: row["image"])
            assert digest_of_folds([row["fold"] for row in rows]) == record["folds_sha256"], name


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("BTCV_dataset_0", (24, 6, 20)), ("MMWHS_dataset", (16, 4, 0)), ("LUNA16_pretrain", (843, 45, 0))],
)
def test_lists_of_voco_are_read_and_their_parts_are_apart(
    name: str, sizes: tuple[int, int, int], reference_dir: Path
) -> None:
    path = reference_dir / "splits" / f"voco_{name}.json"
    listing = read_listing(path)
    assert (len(listing.training), len(listing.validation), len(listing.test)) == sizes
    named = [image for image, _ in (*listing.training, *listing.validation)]
    chosen = listed_splits(path, [Case(image, image, Path(image)) for image in named])
    assert (len(chosen.train), len(chosen.val)) == sizes[:2] and chosen.notes == ("selection = reporting",)


def test_series_that_pcrlv2_trained_on_are_counted_where_voco_validates(reference_dir: Path) -> None:
    listing = read_listing(reference_dir / "splits" / "voco_LUNA16_pretrain.json")
    trained = (reference_dir / "splits" / "pcrlv2_luna_train.txt").read_text(encoding="utf-8").split()
    parts = [
        tuple(Case(name, name, Path(name)) for name in names)
        for names in (trained, [image.removesuffix(".nii.gz") for image, _ in listing.validation])
    ]
    assert len(set(trained)) == 623
    found = leakage_report(Splits(*parts, parts[1]))
    assert found[0] == "leak: 45 of 45 val cases are of patients in train (45 of 45)"


def test_folds_keep_patients_together_and_strata_in_proportion() -> None:
    everyone = cases()
    folds = patient_kfold(everyone, 5, seed=1)
    assert sorted(case.id for fold in folds for case in fold) == sorted(case.id for case in everyone)
    assert all(not people(one) & people(other) for one in folds for other in folds if one is not other)
    assert {len(people(fold)) for fold in folds} == {4, 5}
    for stratum in "abc":
        counts = [len({case.patient for case in fold if case.stratum == stratum}) for fold in folds]
        assert max(counts) - min(counts) <= 1
    assert folds == patient_kfold(everyone[::-1], 5, seed=1)
    assert folds != patient_kfold(everyone, 5, seed=2)


def test_every_patient_is_reported_once_over_the_folds() -> None:
    folds = patient_kfold(cases(), 5, seed=0)
    seen: list[str] = []
    for fold in range(5):
        splits = nested_splits(folds, resolve_finetune_config({"fold": fold}))
        assert not leakage_report(splits)
        assert len(splits.train) + len(splits.val) + len(splits.test) == 46
        seen += [case.id for case in splits.test]
    assert sorted(seen) == sorted(case.id for case in cases())
    published = nested_splits(folds, resolve_finetune_config({"protocol": "reference"}))
    assert published.val == published.test and published.notes == ("selection = reporting",)
    with pytest.raises(ConfigError, match="num_folds=3"):
        nested_splits(patient_kfold(cases(), 2), resolve_finetune_config({"num_folds": 2}))


def test_shares_are_nested_patient_wise_and_stratified() -> None:
    everyone = cases(60)
    parts = [data_fraction(everyone, share, seed=4) for share in (0.01, 0.1, 0.5, 1.0)]
    assert [len(people(part)) for part in parts] == [3, 6, 30, 60]
    for small, large in itertools.pairwise(parts):
        assert {case.id for case in small} <= {case.id for case in large}
    assert all({case.stratum for case in part} == set("abc") for part in parts)
    assert all(sum(case.patient == patient for case in parts[1]) == 2 for patient in people(parts[1]))
    assert data_fraction(everyone, 0.1, seed=5) != parts[1]


def test_shuffled_labels_stay_with_patients() -> None:
    everyone = cases(30)
    shuffled = permuted_labels(everyone, seed=0)
    assert [case.id for case in shuffled] == [case.id for case in everyone]
    assert any(one.targets != other.targets for one, other in zip(everyone, shuffled, strict=True))
    assert all(len({case.targets for case in shuffled if case.patient == name}) == 1 for name in people(shuffled))
    assert sorted(case.targets for case in shuffled) == sorted(case.targets for case in everyone)
    with pytest.raises(ConfigError, match="shuffle_labels"):
        permuted_labels([Case("a", "a", Path("x"))])


def test_leaks_are_told_and_refused_in_clean() -> None:
    everyone = tuple(cases(6))
    leaky = Splits(everyone[:7], everyone[7:10], everyone[10:])
    (told,) = leakage_report(leaky)
    assert told == "leak: 1 of 3 val cases are of patients in train (1 of 2)"
    with pytest.raises(DataError, match="not apart"):
        refuse_leakage(leaky, "clean")
    assert refuse_leakage(leaky, "reference") == leakage_report(leaky)
    with pytest.raises(DataError, match="twice"):
        refuse_leakage(Splits((everyone[0], everyone[0]), everyone[2:4], everyone[4:]), "reference")
