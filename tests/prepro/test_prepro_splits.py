"""Split rules and leakage."""

from __future__ import annotations

from pathlib import Path

import pytest

from mg3d.errors import DataError
from prepro.readers.base import Case, CaseList
from prepro.splits import assign_splits, draw_patients, limit_splits, overlaps, patient_overlaps, refuse_overlaps


def _case(name: str, origin: str, position: int = 0) -> Case:
    return Case(name, name.rsplit("_", 2)[0], origin, (Path(name),), "f", "i", position=position)


def _found(train: int, valid: int) -> CaseList:
    cases = [_case(f"train_{n}_a_{r}", "train") for n in range(train) for r in (1, 2)]
    return CaseList([*cases, *(_case(f"valid_{n}_a_1", "valid") for n in range(valid))], entries=2 * train + valid)


def test_clean_ct_rate_draws_two_percent_of_the_training_patients() -> None:
    cases, unused = assign_splits(_found(200, 30), "clm_ct_rate")
    split_of = {case.image_id: case.splits for case in cases}
    val_patients = {case.patient_id for case in cases if case.splits == ("val",)}
    assert len(val_patients) == 4
    assert not unused
    assert all(split_of[f"valid_{n}_a_1"] == ("test",) for n in range(30))
    assert all(case.splits == ("val",) for case in cases if case.patient_id in val_patients)
    assert patient_overlaps(cases) == []


def test_draw_depends_on_seed_and_names_only() -> None:
    names = [f"p{n}" for n in range(100)]
    assert draw_patients(names, 0.1, 0) == draw_patients(reversed(names * 2), 0.1, 0)
    assert draw_patients(names, 0.1, 0) != draw_patients(names, 0.1, 1)
    assert len(draw_patients(names[:2], 0.02, 0)) == 1
    assert draw_patients(names[:1], 0.5, 0) == set()
    assert draw_patients(names, 0.0, 0) == set()


def test_reference_ct_rate_uses_valid_twice() -> None:
    cases, _ = assign_splits(_found(10, 3), "clm_ct_rate", "reference")
    assert {case.splits for case in cases} == {("train",), ("val", "test")}
    assert len(patient_overlaps(cases)) == 3


def test_ctrg_clean_holds_the_test_list_out() -> None:
    cases = [_case(f"{n}_x_x", "train", n) for n in range(40)] + [_case(f"t{n}_x_x", "test", n) for n in range(5)]
    found = CaseList([*cases, _case("v_x_x", "val")], entries=46)
    assigned, unused = assign_splits(found, "clm_chest_ctrg", seed=3)
    counts = {split: sum(case.splits == (split,) for case in assigned) for split in ("train", "val", "test")}
    assert counts == {"train": 36, "val": 4, "test": 5}
    assert [item.image_id for item in unused] == ["v_x_x"]


@pytest.mark.parametrize(("entries", "counts"), [(1804, (1444, 180, 180)), (5, (5, 0, 0)), (20, (17, 2, 1))])
def test_ctrg_reference_cuts_by_position(entries: int, counts: tuple[int, int, int]) -> None:
    found = CaseList([_case(f"{n}_x_x", "train", n) for n in range(entries)], entries=entries)
    cases, _ = assign_splits(found, "clm_chest_ctrg", "reference")
    assert tuple(sum(case.splits == (split,) for case in cases) for split in ("train", "test", "val")) == counts
    assert [case.splits for case in cases] == sorted(
        (case.splits for case in cases), key=lambda splits: ("train", "test", "val").index(splits[0])
    )


def test_a_patient_on_both_sides_is_refused_and_named() -> None:
    found = _found(3, 1)
    found.cases.append(_case("train_1_b_1", "valid"))
    cases, _ = assign_splits(found, "clm_ct_rate", val_fraction=0.0)
    pairs = patient_overlaps(cases)
    assert pairs == ["train_1_b_1 (test) and train_1_a_1, train_1_a_2 (train)"]
    with pytest.raises(DataError, match=r"1 patients in more than one split: train_1_b_1"):
        refuse_overlaps(pairs, "patients")


def test_overlap_list_stays_short() -> None:
    pairs = overlaps((f"key{n}", split, f"{split}{n}") for n in range(9) for split in ("train", "test"))
    assert len(pairs) == 9
    with pytest.raises(DataError) as caught:
        refuse_overlaps(pairs, "patients")
    assert len(str(caught.value).splitlines()) <= 5


def test_limit_counts_each_split() -> None:
    cases, _ = assign_splits(_found(50, 20), "clm_ct_rate")
    kept = limit_splits(cases, 3)
    assert [sum(split in case.splits for case in kept) for split in ("train", "val", "test")] == [3, 2, 3]
    assert limit_splits(cases, None) == cases
