"""Decathlon lung and colon: layout, published folds, settings of both tasks, crops, learning rate, the check."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from damage import cut, rewrite, shifted, voxels_of
from entry import assert_complete, metrics_of, rows_of, run_phantom, start
from folders import config, load_folder

from mg3d.datasets.segmentation_case import prepare_case, read_label_map
from mg3d.datasets.segmentation_crops import CropCentres
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.learning_rate import describe_learning_rate, effective_learning_rate
from mg3d.finetuning.names import experiment_name
from mg3d.finetuning.splits import contiguous_blocks
from mg3d.phantoms.downstream.msd import write_msd

msd = load_folder("MSD")
BENCHMARK = msd.BENCHMARK
CASES = 7
ORGANS = ("lung", "colon")


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("msd") / "download"
    write_msd(root, cases=CASES, test=1, seed=0)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


@pytest.mark.parametrize(("organ", "folder"), [("lung", "Task06_Lung"), ("colon", "Task10_Colon")])
def test_the_phantom_has_the_published_layout(download: Path, organ: str, folder: str) -> None:
    content = json.loads((download / folder / "dataset.json").read_text(encoding="utf-8"))
    assert content["modality"] == {"0": "CT"} and content["numTraining"] == CASES and content["numTest"] == 1
    assert content["labels"]["0"] == "background" and set(content["labels"]) == {"0", "1"}
    for pair in content["training"]:
        image, label = voxels_of(download / folder / pair["image"]), voxels_of(download / folder / pair["label"])
        assert image.shape == label.shape and set(np.unique(label)) == {0, 1}
    assert content["training"][0]["image"] == f"./imagesTr/{organ}_001.nii.gz"
    assert (download / folder / content["test"][0]).is_file()


@pytest.mark.parametrize("organ", ORGANS)
def test_folds_hold_out_every_case_once(download: Path, organ: str) -> None:
    sizes, reported = [], []
    for fold in range(5):
        chosen = BENCHMARK.splits(config(BENCHMARK, data_root=str(download), organ=organ, fold=fold))
        parts = [{case.id for case in part} for part in (chosen.train, chosen.val, chosen.test)]
        assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == CASES
        sizes.append(len(chosen.test))
        reported += [case.id for case in chosen.test]
    assert sizes == [2, 2, 1, 1, 1] and len(set(reported)) == CASES
    assert all(name.startswith(f"{organ}_") for name in reported)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "sizes"), [("MSD_Task06_Lung", [13, 13, 13, 12, 12]), ("MSD_Task10_Colon", [26, 25, 25, 25, 25])]
)
def test_the_rule_gives_the_published_folds(shared_dir: Path, file: str, sizes: list[int]) -> None:
    path = shared_dir / "data" / "splits" / f"{file}_folds.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["training"]
    cases = [Case(name, name, Path(name)) for name in sorted(row["image"] for row in rows)]
    folds = contiguous_blocks(cases, 5)
    assert [len(fold) for fold in folds] == sizes
    assert {case.id: number for number, fold in enumerate(folds) for case in fold} == {
        row["image"]: row["fold"] for row in rows
    }


def test_lung_and_colon_have_their_own_settings(download: Path) -> None:
    wanted = {"lung": ((1.5,) * 3, (-175.0, 250.0), "dice"), "colon": ((1.0,) * 3, (-57.0, 175.0), "dice_squared_ce")}
    for organ, (spacing, window, loss) in wanted.items():
        cfg = config(BENCHMARK, data_root=str(download), organ=organ)
        task = BENCHMARK.resolve_task(cfg)
        assert (task.spacing_mm, task.window, task.loss, task.roi) == (spacing, window, loss, (96, 96, 96))
        prepared = prepare_case(msd.read_cases(cfg)[0], task)
        assert prepared.grid.spacing_mm == pytest.approx(spacing)
        assert prepared.image.min() == 0.0 and prepared.image.max() == 1.0
    with pytest.raises(ConfigError, match="lung, colon"):
        BENCHMARK.resolve_task(config(BENCHMARK, organ="liver"))


@pytest.mark.parametrize("organ", ORGANS)
def test_the_foreground_crop_loses_no_label_voxel(download: Path, organ: str) -> None:
    cfg = config(BENCHMARK, data_root=str(download), organ=organ)
    task = BENCHMARK.resolve_task(cfg)
    cases = msd.read_cases(cfg)
    assert cases
    for case in cases:
        cropped = prepare_case(case, task)
        whole = prepare_case(case, replace(task, foreground_crop="none"))
        assert int(cropped.label.sum()) == int(whole.label.sum()) > 0


def test_lung_and_colon_runs_have_folders_of_their_own() -> None:
    names = {experiment_name(config(BENCHMARK, organ=organ)) for organ in ORGANS}
    assert names == {"MSD-lung-swin_b-full-fold0", "MSD-colon-swin_b-full-fold0"}


def test_twice_as_many_crops_on_tumour_where_asked_for(download: Path) -> None:
    cfg = config(BENCHMARK, data_root=str(download), organ="lung")
    assert BENCHMARK.resolve_task(cfg).positive == 2.0
    assert BENCHMARK.resolve_task(config(BENCHMARK, organ="lung", protocol="reference")).positive == 1.0
    assert BENCHMARK.resolve_task(config(BENCHMARK, organ="colon")).positive == 1.0
    task = BENCHMARK.resolve_task(config(BENCHMARK, organ="colon", positive=2.0))
    prepared = prepare_case(msd.read_cases(cfg)[0], task)
    centres = CropCentres(prepared.label, prepared.image, task.positive / (task.positive + task.negative))
    rng = np.random.default_rng(0)
    hits = sum(int(prepared.label[centres.draw(rng)]) for _ in range(300))
    assert abs(hits - 200) < 3 * math.sqrt(300 * 2 / 9)


def test_labels_keep_their_number_whatever_a_case_holds(tmp_path: Path) -> None:
    task = replace(BENCHMARK.task, classes=("first", "second"), label_map={0: 0, 1: 1, 2: 2})
    labels = np.zeros((8, 8, 8), dtype=np.uint8)
    labels[2:4] = 2
    file = tmp_path / "lung_001.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.eye(4)), file)
    assert set(np.unique(read_label_map(Case("lung_001", "lung_001", file, file), task))) == {0, 2}


def test_the_learning_rate_of_the_published_run_is_1e_4() -> None:
    cfg = config(BENCHMARK)
    task = BENCHMARK.resolve_task(cfg)
    assert effective_learning_rate(cfg, task, 2) == pytest.approx(1e-4)
    assert effective_learning_rate(cfg, task, 1) == pytest.approx(5e-5)
    assert effective_learning_rate(config(BENCHMARK, accumulate=2, batch_size=2), task, 1) == pytest.approx(2e-4)
    assert describe_learning_rate(cfg, task, 2).startswith("learning rate 0.0001 = 0.0002 x (1 volumes x 4 crops x 2")


@pytest.mark.parametrize("organ", ORGANS)
def test_a_sound_download_has_no_problem(download: Path, organ: str) -> None:
    for full in (False, True):
        assert BENCHMARK.check_data(config(BENCHMARK, data_root=str(download), organ=organ, full_check=full)) == []
    folder = str(download / msd.FOLDERS[organ])
    assert BENCHMARK.check_data(config(BENCHMARK, data_root=folder, organ=organ)) == []


def test_everything_wrong_is_listed_at_once(own_copy: Path) -> None:
    folder = own_copy / "Task06_Lung"
    (folder / "labelsTr" / "lung_001.nii.gz").unlink()
    (folder / "imagesTr" / "lung_003.nii.gz").unlink()
    cut(folder / "imagesTr" / "lung_005.nii.gz")
    label = folder / "labelsTr" / "lung_007.nii.gz"
    rewrite(label, voxels=voxels_of(label) + np.uint8(1))
    other = folder / "labelsTr" / "lung_009.nii.gz"
    rewrite(other, voxels=voxels_of(other)[:, :-2])
    cut(folder / "imagesTs" / "lung_015.nii.gz", 0.3)
    (folder / "imagesTr" / "lung_099.nii.gz").write_bytes(b"")
    problems = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy)))
    expected = (
        ("labelsTr", "missing: lung_001.nii.gz"),
        ("imagesTr", "missing: lung_003.nii.gz"),
        ("imagesTr/lung_005", "truncated"),
        ("labelsTr/lung_007", "label values 2"),
        ("labelsTr/lung_009", "shape"),
        ("imagesTs/lung_015", "truncated"),
        ("imagesTr", "does not belong there: lung_099.nii.gz"),
    )
    for file, what in expected:
        assert [line for line in problems if file in line and what in line and "mend: " in line], (file, problems)
    assert len(problems) == len(expected)


def test_every_item_of_the_nnunet_checklist_is_found_and_all_at_once(tmp_path: Path) -> None:
    write_msd(tmp_path, cases=12, test=1, seed=0)
    folder = tmp_path / "Task06_Lung"
    listing = folder / "dataset.json"
    listing.write_text(
        listing.read_text(encoding="utf-8").replace('"numTraining": 12', '"numTraining": 13'), encoding="utf-8"
    )
    names = sorted(path.name for path in (folder / "labelsTr").iterdir())
    image, label = ([folder / part / name for name in names] for part in ("imagesTr", "labelsTr"))
    label[0].unlink()  # every label file is there
    rewrite(label[1], voxels=voxels_of(label[1]) * np.uint8(3))  # only expected values
    rewrite(label[2], voxels=voxels_of(label[2]).astype(np.float32) * 0.7)  # whole numbers
    rewrite(label[3], voxels=voxels_of(label[3])[:-1])  # equal shapes
    rewrite(label[4], affine=nib.load(label[4]).affine @ np.diag([1.1, 1.1, 1.1, 1]))  # equal spacing
    rewrite(label[5], affine=nib.load(label[5]).affine @ np.diag([-1, 1, 1, 1]))  # equal direction
    rewrite(label[6], affine=shifted(label[6], 5.0))  # equal origin
    rewrite(image[7], voxels=np.stack([voxels_of(image[7])] * 2, axis=-1))  # one channel
    rewrite(image[8], voxels=np.where(voxels_of(image[8]) > 0, np.nan, 1).astype(np.float32))  # NaN in an image
    rewrite(label[9], voxels=np.where(voxels_of(label[9]) > 0, np.nan, 0).astype(np.float32))  # NaN in a label map
    rewrite(label[10], voxels=voxels_of(label[10]) * np.uint8(0))  # something to learn
    cut(image[11])
    problems = BENCHMARK.check_data(config(BENCHMARK, data_root=str(tmp_path), full_check=True))
    expected = (
        (listing, "numTraining is 13, but 12"),
        (folder / "labelsTr", f"missing: {names[0]}"),
        (label[1], "label values 3"),
        (label[2], "no whole number, such as 0.7"),
        (label[3], "shape"),
        (label[4], "beside its image"),
        (label[5], "beside its image"),
        (label[6], "beside its image"),
        (image[7], "expected one 3-D volume"),
        (image[8], "NaN"),
        (label[9], "no whole number, such as nan"),
        (label[10], "all background"),
        (image[11], "truncated"),
    )
    for file, what in expected:
        assert [line for line in problems if line.startswith(f"{file}: ") and what in line], (file.name, problems)
    assert len(problems) == len(expected), problems


def test_a_damaged_listing_and_no_data_are_one_problem_each(own_copy: Path, tmp_path: Path) -> None:
    (own_copy / "Task06_Lung" / "dataset.json").write_text('{"training": 3}', encoding="utf-8")
    problems = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy)))
    assert len(problems) == 1 and "dataset.json" in problems[0]
    assert len(BENCHMARK.check_data(config(BENCHMARK, data_root=str(tmp_path / "no")))) == 1
    with pytest.raises(DataError, match="data_root"):
        BENCHMARK.splits(config(BENCHMARK, data_root=str(tmp_path / "no")))


def test_help_starts_from_anywhere(tmp_path: Path) -> None:
    shown = start("MSD", tmp_path, "--help")
    assert shown.code == 0 and "organ" in shown.out and "colon" in shown.out


@pytest.mark.slow
def test_the_phantom_run_of_the_colon_task(tmp_path: Path) -> None:
    done = run_phantom("MSD", tmp_path, "colon")
    run_dir = Path(done.answer["run_dir"])
    images = {path.name.removesuffix(".nii.gz"): path for path in (tmp_path / "in").rglob("imagesTr/*.nii.gz")}
    assert_complete(run_dir, images, labels=1)
    metrics = metrics_of(run_dir)
    assert {"dice", "hd95", "nsd@2", "nsd@4"} <= set(metrics) and set(metrics["dice"]["per_class"]) == {"cancer"}
    assert [row["id"] for row in rows_of(run_dir)] == ["colon_001", "colon_003"]
