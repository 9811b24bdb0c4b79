"""CTRG: layout of the phantom, splits, labels, vocabulary, images on the network's grid, the check of a download."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from folders import config, load_folder

from mg3d.datasets.labels import CHEXBERT_LABELS
from mg3d.datasets.report_vocabulary import UNKNOWN, clean_published
from mg3d.errors import DataError
from mg3d.phantoms.downstream.ctrg import write_ctrg
from mg3d.phantoms.report import stated_findings
from mg3d.phantoms.studies import plan_studies
from mg3d.scans.ctrg import read_ctrg
from prepro.readers.ctrg import CtrgReader
from prepro.splits import assign_splits

ctrg = load_folder("CTRG")
BENCHMARK = ctrg.BENCHMARK
STUDIES = 20
SIZE = [32, 24, 32]


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ctrg") / "download"
    write_ctrg(root, studies=STUDIES, size=32, seed=3)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


def cfg_of(root: Path, **keys: Any) -> Any:
    return config(BENCHMARK, data_root=str(root), roi=SIZE, **keys)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "annotation.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def ids(cases: tuple[Any, ...]) -> set[str]:
    return {case.id for case in cases}


def test_clean_splits_share_no_case_and_select_on_training_cases(download: Path) -> None:
    chosen = BENCHMARK.splits(cfg_of(download))
    train, val, test = ids(chosen.train), ids(chosen.val), ids(chosen.test)
    assert not train & val and not train & test and not val & test
    assert test == {str(number) for number in range(17, 21)}
    assert len(val) == 2 and len(train) == 14
    assert ids(BENCHMARK.splits(cfg_of(download, seed=1)).val) != val
    assert ids(BENCHMARK.splits(cfg_of(download)).val) == val


def test_reference_splits_report_on_what_selects_and_say_so(download: Path) -> None:
    chosen = BENCHMARK.splits(cfg_of(download, protocol="reference"))
    assert ids(chosen.val) == ids(chosen.test) and len(chosen.test) == 4
    assert chosen.notes == ("selection = reporting",)


def test_pre_training_never_sees_a_test_case_and_selects_on_the_same_ones(download: Path) -> None:
    chosen = BENCHMARK.splits(cfg_of(download))
    found = CtrgReader(download, download / "annotation.json", geometry=None).find_cases()
    packed, _ = assign_splits(found, "clm_chest_ctrg", "clean", seed=cfg_of(download).seed)
    places = {split: {case.image_id for case in packed if split in case.splits} for split in ("train", "val", "test")}
    assert places["test"] == ids(chosen.test)
    assert places["val"] == ids(chosen.val)
    assert not (places["train"] | places["val"]) & ids(chosen.test)


def test_a_train_case_that_is_also_a_test_case_is_left_out(own_copy: Path) -> None:
    edit(own_copy, lambda content: content["train"].append(content["test"][0]))
    chosen = BENCHMARK.splits(cfg_of(own_copy))
    assert "1 train cases left out, they are also test cases" in chosen.notes
    assert not ids(chosen.train + chosen.val) & ids(chosen.test)


def test_only_code_1_is_present(own_copy: Path) -> None:
    path = own_copy / "CTRG_finding_labels.csv"
    rows = [["id", *CHEXBERT_LABELS], *([str(number), *[0, 1, 2, 3] * 3, 1, 2] for number in range(1, STUDIES + 1))]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    targets = BENCHMARK.splits(cfg_of(own_copy)).train[0].targets
    assert targets == (0, 1, 0, 0) * 3 + (1, 0)


def test_the_phantom_labels_agree_with_its_reports(download: Path) -> None:
    names, labels = ctrg.read_labels(cfg_of(download))
    assert names == CHEXBERT_LABELS
    texts = {row["id"]: row["report"] for rows in ctrg.read_annotation(cfg_of(download)).values() for row in rows}
    column = {"Cardiomegaly": "cardiomegaly", "Pleural effusion": "pleural_effusion", "Lung nodule": "lung_lesion"}
    for name, values in labels.items():
        for finding, label in column.items():
            assert (finding in stated_findings(texts[name])) == bool(values[CHEXBERT_LABELS.index(label)])


def test_findings_are_read_from_written_and_from_cleaned_text() -> None:
    for study in plan_studies("ctrg", 40, 32, 5):
        drawn = {lesion.finding for lesion in study.case.lesions}
        assert stated_findings(study.report.findings) == drawn
        assert stated_findings(clean_published(study.report.findings)) == drawn
    assert stated_findings("") == frozenset()


def test_the_vocabulary_knows_training_reports_only(own_copy: Path) -> None:
    edit(own_copy, lambda content: [row.update(report=row["report"] + " Zebra.") for row in content["test"]])
    task = BENCHMARK.resolve_task(cfg_of(own_copy, min_count=1))
    assert "zebra" not in task.vocabulary.words and UNKNOWN in task.vocabulary.words
    assert task.size_dhw == tuple(SIZE) and task.labels == CHEXBERT_LABELS
    sizes = [BENCHMARK.resolve_task(cfg_of(own_copy, min_count=count)).vocabulary.size for count in (1, 3, 10)]
    assert sizes == sorted(sizes, reverse=True)


def test_protocols_choose_what_the_memory_sees(download: Path) -> None:
    assert BENCHMARK.resolve_task(cfg_of(download)).text_memory == 0.0
    assert BENCHMARK.resolve_task(cfg_of(download, protocol="reference")).text_memory == 1.0


def test_images_are_on_the_grid_of_pre_training(download: Path) -> None:
    cfg = cfg_of(download)
    case = BENCHMARK.splits(cfg).train[0]
    image = ctrg.load(case, cfg)
    assert image.shape == tuple(SIZE) and image.dtype == np.float32
    assert 0 <= image.min() < 0.1 and 0.5 < image.max() <= 1


def test_nifti_volumes_are_turned_upside_up_once(tmp_path: Path) -> None:
    values = np.zeros((512, 512, 50), dtype=np.uint8)
    values += np.arange(50, dtype=np.uint8) * 5
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "7.nii.gz")
    image = read_ctrg(tmp_path / "7.nii.gz")
    assert image.shape == (128, 96, 128)
    # 44 of 50 slices are kept (3 to 46), from corner to corner, the last stored one first
    assert image[0] == pytest.approx(46 * 5 / 255) and image[-1] == pytest.approx(3 * 5 / 255)


def test_values_beyond_grey_are_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), -1000, dtype=np.int16), np.eye(4)), tmp_path / "7.nii.gz")
    with pytest.raises(DataError, match="not 8-bit grey"):
        read_ctrg(tmp_path / "7.nii.gz")


def test_a_sound_download_has_no_problem_and_a_damaged_one_tells_all(own_copy: Path) -> None:
    assert BENCHMARK.check_data(cfg_of(own_copy)) == []
    shutil.rmtree(own_copy / "Chest_New" / "3")
    edit(own_copy, lambda content: content["train"][0].update(report=" "))
    table = own_copy / "CTRG_finding_labels.csv"
    table.write_text("\n".join(table.read_text(encoding="utf-8").splitlines()[:-1]) + "\n", encoding="utf-8")
    lines = BENCHMARK.check_data(cfg_of(own_copy))
    assert len(lines) == 3
    assert all("mend:" in line for line in lines)
    assert "1 images are missing" in lines[0] and "Chest_New/3" in lines[0]
    assert "1 reports are empty: 1" in lines[1] and "1 cases have no labels: 20" in lines[2]


def test_what_is_missing_altogether_is_named(own_copy: Path, tmp_path: Path) -> None:
    assert "no annotation.json or" in BENCHMARK.check_data(cfg_of(tmp_path / "nothing"))[0]
    (own_copy / "CTRG_finding_labels.csv").unlink()
    assert "label_loss=0" in BENCHMARK.check_data(cfg_of(own_copy))[0]
    assert BENCHMARK.check_data(cfg_of(own_copy, label_loss=0.0, ranking_loss=0.0)) == []
    assert BENCHMARK.resolve_task(cfg_of(own_copy, label_loss=0.0, ranking_loss=0.0)).labels == ()
    (own_copy / "annotation.json").write_text('{"train": [{"id": 1}]}', encoding="utf-8")
    with pytest.raises(DataError, match="not CTRG's annotation"):
        BENCHMARK.splits(cfg_of(own_copy))
