"""COVID-19-20: layout, published folds from the rule, preprocessing, learning rate, tables, the check of a download."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from damage import cut, rewrite, shifted, voxels_of
from entry import assert_complete, metrics_of, rows_of, run_phantom, start
from folders import config, load_folder

from mg3d.datasets.segmentation_case import prepare_case
from mg3d.datasets.segmentation_crops import draw_crops
from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.learning_rate import describe_learning_rate, effective_learning_rate
from mg3d.finetuning.splits import contiguous_blocks
from mg3d.models.finetune.segmentation_rows import scored_rows
from mg3d.phantoms.downstream.covid19_20 import STORED_SPACING_MM, write_covid19_20

covid = load_folder("Covid19_20")
BENCHMARK = covid.BENCHMARK
CASES = 7


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("covid") / "download"
    write_covid19_20(root, cases=CASES, unlabelled=1, seed=0)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


def test_the_phantom_has_the_published_layout(download: Path) -> None:
    names = sorted(path.name for path in (download / "Train").iterdir())
    assert len(names) == 2 * CASES and names[0] == "volume-covid19-A-0003_ct.nii.gz"
    assert "volume-covid19-A-0015_1_seg.nii.gz" in names
    assert [path.name for path in (download / "Validation").iterdir()] == ["volume-covid19-A-2100_1_ct.nii.gz"]
    image = nib.load(download / "Train" / names[0])
    values, mask = voxels_of(download / "Train" / names[0]), voxels_of(download / "Train" / names[1])
    assert image.header.get_zooms() == pytest.approx(STORED_SPACING_MM) and values.shape == mask.shape
    assert -1024 <= values.min() < -900 and 300 < values.max() <= 600
    assert set(np.unique(mask)) == {0, 1} and values[mask == 1].mean() > -800


def test_patients_and_ids_come_from_the_names(download: Path) -> None:
    cases = covid.read_cases(download)
    assert [case.id for case in cases][3:6] == ["A-0012", "A-0015_1", "A-0018"]
    assert cases[4].patient == "A-0015"
    assert covid.read_cases(download / "Train") == cases


def test_seven_cases_give_folds_of_two_two_one_one_one(download: Path) -> None:
    sizes, reported = [], []
    for fold in range(5):
        chosen = BENCHMARK.splits(config(BENCHMARK, data_root=str(download), fold=fold))
        parts = [{case.patient for case in part} for part in (chosen.train, chosen.val, chosen.test)]
        assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == CASES
        sizes.append(len(chosen.test))
        reported += [case.id for case in chosen.test]
    assert sizes == [2, 2, 1, 1, 1] and reported == [case.id for case in covid.read_cases(download)]
    published = BENCHMARK.splits(config(BENCHMARK, data_root=str(download), protocol="reference"))
    assert published.val == published.test and len(published.train) == 5
    assert "selection = reporting" in " ".join(published.notes)


@pytest.mark.realdata
def test_the_rule_gives_the_published_folds(shared_dir: Path) -> None:
    path = shared_dir / "data" / "splits" / "Covid19_20_folds.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["training"]
    folds = contiguous_blocks([_case(row["image"]) for row in rows], 5)
    assert [len(fold) for fold in folds] == [40, 40, 40, 40, 39]
    ours = {case.image.name: number for number, fold in enumerate(folds) for case in fold}
    assert ours == {row["image"]: row["fold"] for row in rows}
    assert [len({case.patient for case in fold}) for fold in folds] == [40, 40, 40, 40, 39]


def test_preprocessing_gives_the_published_grid_and_range(download: Path, tmp_path: Path) -> None:
    cfg = config(BENCHMARK, data_root=str(download))
    task = BENCHMARK.resolve_task(cfg)
    case = covid.read_cases(download)[0]
    prepared = prepare_case(case, task)
    assert prepared.grid.spacing_mm == pytest.approx((1.25, 1.25, 5.0))
    assert prepared.image.shape == (77, 77, 36) == prepared.label.shape
    assert prepared.image.min() == 0.0 and 0.8 < prepared.image.max() <= 1.0
    ramp = np.linspace(-1024, 600, 64 * 64 * 36).reshape(64, 64, 36)
    ramp[0, 0, :2], ramp[1, 0, 0] = -1000, 500
    file = tmp_path / "volume-covid19-A-0001_ct.nii.gz"
    nib.save(nib.Nifti1Image(ramp.astype(np.float32), np.diag([-1.25, -1.25, 5.0, 1.0])), file)
    values = prepare_case(Case("ramp", "ramp", file), task).image
    assert values[0, 0, 0] == 0.0 and values[1, 0, 0] == 1.0 and values.min() == 0.0 and values.max() == 1.0


def test_a_case_gives_three_crops_of_the_window(download: Path) -> None:
    cfg = config(BENCHMARK, data_root=str(download))
    task = BENCHMARK.resolve_task(cfg)
    images, labels = draw_crops(prepare_case(covid.read_cases(download)[0], task), task, np.random.default_rng(0))
    assert images.shape == labels.shape == (3, 192, 192, 32)
    fewer = BENCHMARK.resolve_task(config(BENCHMARK, crops_per_volume=1, roi=[64, 64, 32]))
    images, _ = draw_crops(prepare_case(covid.read_cases(download)[0], fewer), fewer, np.random.default_rng(0))
    assert images.shape == (1, 64, 64, 32)


def test_the_learning_rate_follows_the_crops_of_a_step() -> None:
    cfg = config(BENCHMARK)
    task = BENCHMARK.resolve_task(cfg)
    assert effective_learning_rate(cfg, task, 2) == pytest.approx(7.5e-5)
    assert "7.5e-05 = 0.0002 x (1 volumes x 3 crops x 2 processes x 1 passes) / 16" in describe_learning_rate(
        cfg, task, 2
    )
    assert effective_learning_rate(config(BENCHMARK, learning_rate_crops=0), task, 2) == 2e-4


def test_result_table_has_a_name_for_every_value(download: Path, tmp_path: Path) -> None:
    cfg = config(BENCHMARK, data_root=str(download))
    scores = {"dice": 0.5, "nsd@2": 0.25, "hd95": 12.5}
    rows = [{"id": case.id, "class": "lesion", **scores} for case in covid.read_cases(download)[:2]]
    BENCHMARK.write_results(cfg, tmp_path, rows)
    with (tmp_path / "result.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["data_path", "target_path", "prediction", "DSC", "NSD", "HD95"]
    assert len(lines) == 2 and all(len(line) == len(header) for line in lines)
    assert lines[0][3:] == ["50.0000", "25.0000", "12.5000"] and Path(lines[0][0]).is_file()


def test_a_sound_download_has_no_problem(download: Path) -> None:
    for full in (False, True):
        cfg = config(BENCHMARK, data_root=str(download), expected_cases=CASES, full_check=full)
        assert BENCHMARK.check_data(cfg) == []


def test_everything_wrong_is_listed_at_once(own_copy: Path) -> None:
    folder = own_copy / "Train"
    (folder / "volume-covid19-A-0003_seg.nii.gz").unlink()
    (folder / "volume-covid19-A-0006_ct.nii.gz").unlink()
    cut(folder / "volume-covid19-A-0009_ct.nii.gz")
    mask = folder / "volume-covid19-A-0012_seg.nii.gz"
    rewrite(mask, voxels=voxels_of(mask) * 3)
    moved = folder / "volume-covid19-A-0015_1_seg.nii.gz"
    rewrite(moved, affine=shifted(moved, -4.0))
    empty = folder / "volume-covid19-A-0018_seg.nii.gz"
    rewrite(empty, voxels=np.zeros_like(voxels_of(empty)))
    (folder / "volume-covid19-A-0021_ct.nii.gz").write_bytes(b"<html>not found</html>")
    (folder / "thumbs.db").write_bytes(b"x")
    problems = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy)))
    expected = (
        ("A-0003_seg", "missing"),
        ("A-0006_seg", "mask without its scan"),
        ("A-0009_ct", "truncated"),
        ("A-0012_seg", "label values 3"),
        ("A-0015_1_seg", "voxels beside"),
        ("A-0018_seg", "all background"),
        ("A-0021_ct", "no readable NIfTI header"),
        ("Train", "6 scans, 199 are published"),
        ("Train", "thumbs.db"),
    )
    for file, what in expected:
        assert [line for line in problems if file in line and what in line and "mend: " in line], (file, problems)
    assert len(problems) == len(expected)


def test_no_data_is_one_problem(tmp_path: Path) -> None:
    problems = BENCHMARK.check_data(config(BENCHMARK, data_root=str(tmp_path)))
    assert len(problems) == 1 and "data_root" in problems[0]
    with pytest.raises(DataError, match="data_root"):
        BENCHMARK.splits(config(BENCHMARK, data_root=str(tmp_path)))


@pytest.mark.parametrize(
    ("spacing_mm", "nsd", "hd95"), [((1.5, 1.5, 1.5), 0.733435, 3.0), ((1.25, 1.25, 5.0), 0.623673, 2.5)]
)
def test_surface_distances_follow_the_spacing(spacing_mm: tuple[float, ...], nsd: float, hd95: float) -> None:
    truth = np.zeros((24, 24, 24), dtype=np.uint8)
    truth[6:14, 6:14, 6:14] = 1
    found = np.roll(truth, 2, axis=0)
    (row,) = scored_rows(_case("volume-covid19-A-0003_ct.nii.gz"), truth, found, spacing_mm, BENCHMARK.task)
    assert (row["nsd@2"], row["hd95"], row["dice"]) == pytest.approx((nsd, hd95, 0.75), abs=1e-6)


def test_help_starts_from_anywhere(tmp_path: Path) -> None:
    shown = start("Covid19_20", tmp_path, "--help")
    assert shown.code == 0 and "expected_cases" in shown.out


@pytest.mark.slow
def test_the_phantom_run_leaves_its_tables_and_three_equal_checkpoints_are_one(tmp_path: Path) -> None:
    done = run_phantom("Covid19_20", tmp_path, "learning_rate=2e-4", "learning_rate_crops=16")
    run_dir = Path(done.answer["run_dir"])
    scans = {case.id: case.image for case in covid.read_cases(tmp_path / "in")}
    assert_complete(run_dir, scans, labels=1)
    assert "learning rate 1.25e-05 = 0.0002 x (1 volumes x 1 crops x 1 processes x 1 passes) / 16" in done.told
    with (run_dir / "result.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert len(lines) == 2 and all(len(line) == len(header) and Path(line[2]).is_file() for line in lines)
    assert {"dice", "hd95", "nsd@2"} <= set(metrics_of(run_dir))
    again = run_phantom(
        "Covid19_20", tmp_path, "stages=evaluate", f"resume={run_dir}", f"ensemble=[{run_dir},{run_dir}]"
    ).answer
    assert again["run_dir"] != str(run_dir)
    for one, other in zip(rows_of(run_dir), rows_of(Path(again["run_dir"])), strict=True):
        assert float(one["dice"]) == pytest.approx(float(other["dice"]), abs=1e-4)


def _case(name: str) -> Case:
    match = covid.PAIR.fullmatch(name)
    return Case(match["id"], match["patient"], Path(name))
