"""ACDC: layout of the phantom, converter, whole patients in every split, the published leak, the check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from damage import cut, flip_a_byte, rewrite, shifted, voxels_of
from entry import assert_complete, metrics_of, rows_of, run_phantom, start
from folders import config, load_folder

from mg3d.datasets.segmentation_case import prepare_case
from mg3d.datasets.segmentation_crops import draw_crops
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.decathlon import listed_splits
from mg3d.models.finetune.segmentation_rows import scored_rows
from mg3d.phantoms.downstream.acdc import SHAPE_XYZ, SPACING_MM, write_acdc

acdc = load_folder("ACDC")
BENCHMARK = acdc.BENCHMARK
PATIENTS = 6


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("acdc") / "download"
    write_acdc(root, patients=PATIENTS, testing=1, seed=0)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


@pytest.fixture(scope="module")
def work(download: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acdc_work")
    BENCHMARK.prepare(config(BENCHMARK, data_root=str(download), work_dir=str(folder)))
    return folder


def all_cases(download: Path, work: Path) -> list[Case]:
    return acdc.read_cases(acdc.prepared_folder(config(BENCHMARK, data_root=str(download), work_dir=str(work))))


def test_the_phantom_has_the_published_layout(download: Path) -> None:
    patient = download / "training" / "patient002"
    info = dict(line.split(": ") for line in (patient / "Info.cfg").read_text(encoding="utf-8").splitlines())
    assert list(info) == ["ED", "ES", "Group", "Height", "NbFrame", "Weight"] and info["Group"] == "MINF"
    film = voxels_of(patient / "patient002_4d.nii.gz")
    assert film.shape == (*SHAPE_XYZ, int(info["NbFrame"]))
    for phase in ("ED", "ES"):
        frame = patient / f"patient002_frame{int(info[phase]):02d}.nii.gz"
        label = frame.with_name(frame.name.replace(".nii", "_gt.nii"))
        assert np.array_equal(voxels_of(frame), film[..., int(info[phase]) - 1])
        assert set(np.unique(voxels_of(label))) == {0, 1, 2, 3}
        assert nib.load(frame).header.get_zooms() == pytest.approx(SPACING_MM)
    assert (download / "testing" / "patient101" / "patient101_4d.nii.gz").is_file()


def test_the_heart_contracts(download: Path, work: Path) -> None:
    sizes = {}
    for case in all_cases(download, work):
        sizes[case.patient, case.tags["phase"]] = int((voxels_of(case.label) == 3).sum())
    for number in range(1, PATIENTS + 1):
        patient = f"patient{number:03d}"
        assert sizes[patient, "ES"] < sizes[patient, "ED"]


def test_the_converter_writes_nnunet_names_and_the_same_bytes(download: Path, work: Path) -> None:
    folder = work / "Dataset027_ACDC"
    names = {path.name for path in (folder / "imagesTr").iterdir()}
    assert len(names) == 2 * PATIENTS and "patient001_frame01_0000.nii.gz" in names
    assert {name.replace("_0000", "") for name in names} == {path.name for path in (folder / "labelsTr").iterdir()}
    assert {path.name[:10] for path in (folder / "imagesTs").iterdir()} == {"patient101"}
    source = download / "training" / "patient001"
    for ours, theirs in (
        ("imagesTr/patient001_frame01_0000", "frame01"),
        ("labelsTr/patient001_frame01", "frame01_gt"),
    ):
        assert (folder / f"{ours}.nii.gz").read_bytes() == (source / f"patient001_{theirs}.nii.gz").read_bytes()
    summary = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert summary["labels"] == {"background": 0, "RV": 1, "MYO": 2, "LV": 3} and summary["numTraining"] == 12


def test_a_stopped_conversion_goes_on_and_a_finished_one_is_kept(own_copy: Path, tmp_path: Path) -> None:
    cfg = config(BENCHMARK, data_root=str(own_copy), work_dir=str(tmp_path / "work"))
    missing = own_copy / "training" / "patient003" / "patient003_frame01.nii.gz"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(DataError, match="patient003_frame01"):
        BENCHMARK.prepare(cfg)
    first = acdc.prepared_folder(cfg) / "imagesTr" / "patient001_frame01_0000.nii.gz"
    before = first.stat().st_ino
    missing.write_bytes(content)
    BENCHMARK.prepare(cfg)
    assert first.stat().st_ino == before
    assert len(acdc.read_cases(acdc.prepared_folder(cfg))) == 2 * PATIENTS
    assert not list(acdc.prepared_folder(cfg).rglob("*.tmp"))


def test_test_patients_need_no_group_and_no_label(own_copy: Path, tmp_path: Path) -> None:
    patient = own_copy / "testing" / "patient101"
    for path in patient.glob("*_gt.nii.gz"):
        path.unlink()
    for info in (patient / "Info.cfg", own_copy / "training" / "patient002" / "Info.cfg"):
        kept = [line for line in info.read_text(encoding="utf-8").splitlines() if not line.startswith("Group")]
        info.write_text("\n".join(kept), encoding="utf-8")
    cfg = config(BENCHMARK, data_root=str(own_copy), work_dir=str(tmp_path / "work"))
    with pytest.raises(DataError, match=r"patient002.*Group is missing"):
        BENCHMARK.prepare(cfg)
    shutil.rmtree(own_copy / "training" / "patient002")
    BENCHMARK.prepare(cfg)
    assert len(acdc.read_cases(acdc.prepared_folder(cfg), "Ts")) == 2
    with pytest.raises(DataError, match="labels"):
        BENCHMARK.splits(config(BENCHMARK, **{**_places(cfg), "official_test": True}))


def _places(cfg: FinetuneConfig) -> dict[str, str]:
    return {"data_root": cfg.data_root, "work_dir": cfg.work_dir}


def test_a_given_nnunet_folder_is_used_as_it_is(work: Path, tmp_path: Path) -> None:
    given = Path(shutil.copytree(work / "Dataset027_ACDC", tmp_path / "Dataset027_ACDC"))
    (given / "cases.json").unlink()
    cfg = config(BENCHMARK, data_root=str(tmp_path), work_dir=str(tmp_path / "work"))
    BENCHMARK.prepare(cfg)
    assert acdc.prepared_folder(cfg) == given and not (tmp_path / "work").exists()
    assert [case.tags["phase"] for case in acdc.read_cases(given)] == ["ED", "ES"] * PATIENTS
    assert BENCHMARK.check_data(cfg) == []


def test_no_patient_is_in_two_parts_and_every_frame_is_reported_once(tmp_path: Path) -> None:
    groups = ("NOR", "MINF", "DCM", "HCM", "RV")
    for seed in (0, 1):
        folder = _empty_frames(tmp_path / str(seed), [groups[number % 5] for number in range(100)])
        reported: list[str] = []
        for fold in range(5):
            cfg = config(BENCHMARK, data_root=str(folder), fold=fold, seed=seed)
            chosen = BENCHMARK.splits(cfg)
            parts = [{case.patient for case in part} for part in (chosen.train, chosen.val, chosen.test)]
            assert sum(map(len, parts)) == len(set.union(*parts)) == 100
            assert len(chosen.test) == 40 and 0 < len(chosen.val) < len(chosen.train)
            assert all(sum(case.stratum == group for case in chosen.test) == 8 for group in groups)
            assert {case.stratum for case in chosen.val} == set(groups)
            assert chosen == BENCHMARK.splits(cfg)
            reported += [case.id for case in chosen.test]
        assert len(reported) == len(set(reported)) == 200


def test_reference_reports_what_it_selects_on_and_says_so(download: Path, work: Path) -> None:
    cfg = config(BENCHMARK, data_root=str(download), work_dir=str(work), protocol="reference")
    chosen = BENCHMARK.splits(cfg)
    assert chosen.val == chosen.test and "selection = reporting" in " ".join(chosen.notes)


def test_the_official_test_patients_can_be_reported(download: Path, work: Path) -> None:
    cfg = config(BENCHMARK, data_root=str(download), work_dir=str(work), official_test=True)
    chosen = BENCHMARK.splits(cfg)
    assert {case.patient for case in chosen.test} == {"patient101"}
    assert {case.patient for case in chosen.train + chosen.val} == {f"patient{n:03d}" for n in range(1, PATIENTS + 1)}


def frame_lists(folder: Path, patients: int = 100) -> Path:
    """Lists as published: frames, not patients, are dealt into five parts; three of them exist."""
    names = [f"patient{n:03d}_frame{k:02d}_0000.nii.gz" for k in (1, 12) for n in range(1, patients + 1)]
    for fold in range(3):
        held = names[fold * len(names) // 5 : (fold + 1) * len(names) // 5]
        parts = {"training": [name for name in names if name not in held], "validation": held}
        content = {
            part: [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name[:18]}.nii.gz"} for name in listed]
            for part, listed in parts.items()
        }
        folder.mkdir(exist_ok=True)
        (folder / f"ACDC_fold{fold}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(params=["made", pytest.param("published", marks=pytest.mark.realdata)])
def lists(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "published":
        return request.getfixturevalue("shared_dir") / "data" / "splits"
    return frame_lists(tmp_path / "lists")


@pytest.mark.parametrize("fold", range(3))
def test_lists_of_frames_leak(tmp_path: Path, fold: int) -> None:
    check_leak(frame_lists(tmp_path / "lists") / f"ACDC_fold{fold}.json", frames=40, patients=40, of=40)


@pytest.mark.realdata
@pytest.mark.parametrize(("fold", "frames", "patients", "of"), [(0, 30, 30, 35), (1, 40, 40, 40), (2, 40, 40, 40)])
def test_the_published_lists_leak(shared_dir: Path, fold: int, frames: int, patients: int, of: int) -> None:
    check_leak(shared_dir / "data" / "splits" / f"ACDC_fold{fold}.json", frames, patients, of)


def check_leak(path: Path, frames: int, patients: int, of: int) -> None:
    """The note on a list says how many of its test frames are of training patients."""
    content = json.loads(path.read_text(encoding="utf-8"))
    names = [Path(entry["image"]).name for entry in content["training"] + content["validation"]]
    cases = [Case(name[:18], name[:10], Path(name)) for name in names]
    chosen = listed_splits(path, cases)
    assert (len(chosen.train), len(chosen.val)) == (160, 40) and chosen.test == chosen.val
    leak = f"leak: {frames} of 40 test cases are of patients in train ({patients} of {of})"
    assert leak in chosen.notes and "selection = reporting" in chosen.notes


def test_a_leaky_list_is_refused_in_clean_and_when_frames_are_missing(lists: Path, download: Path, work: Path) -> None:
    keys = {"data_root": str(download), "work_dir": str(work), "reference_frame_split": str(lists)}
    with pytest.raises(ConfigError, match="protocol=reference"):
        BENCHMARK.splits(config(BENCHMARK, **keys))
    with pytest.raises(DataError, match="images are not there"):
        BENCHMARK.splits(config(BENCHMARK, **keys, protocol="reference"))


def test_a_sound_download_has_no_problem(download: Path) -> None:
    for full in (False, True):
        cfg = config(BENCHMARK, data_root=str(download), expected_patients=PATIENTS, full_check=full)
        assert BENCHMARK.check_data(cfg) == []


def test_everything_wrong_is_listed_at_once(own_copy: Path) -> None:
    training = own_copy / "training"
    (training / "patient001" / "Info.cfg").unlink()
    (training / "patient002" / "patient002_frame01_gt.nii.gz").unlink()
    cut(training / "patient003" / "patient003_frame01.nii.gz")
    label = training / "patient004" / "patient004_frame01_gt.nii.gz"
    wrong = voxels_of(label).copy()
    wrong[0, 0, 0] = 7
    rewrite(label, voxels=wrong)
    moved = training / "patient005" / "patient005_frame01_gt.nii.gz"
    rewrite(moved, affine=shifted(moved, 1.5))
    (training / "patient005" / "notes.txt").write_text("x", encoding="utf-8")
    shape = training / "patient006" / "patient006_frame01_gt.nii.gz"
    rewrite(shape, voxels=voxels_of(shape)[:-1])
    problems = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy), expected_patients=8))
    expected = (
        ("patient001/Info.cfg", "missing"),
        ("patient002_frame01_gt.nii.gz", "missing"),
        ("patient003_frame01.nii.gz", "truncated"),
        ("patient004_frame01_gt.nii.gz", "label values 7"),
        ("patient005_frame01_gt.nii.gz", "voxels beside"),
        ("patient005", "notes.txt"),
        ("patient006_frame01_gt.nii.gz", "shape"),
        ("training", "patient007, patient008"),
    )
    for file, what in expected:
        assert [line for line in problems if file in line and what in line and "mend: " in line], (file, problems)
    assert len(problems) == len(expected)


def test_the_full_check_finds_a_flipped_bit(own_copy: Path) -> None:
    image = own_copy / "training" / "patient002" / "patient002_frame01.nii.gz"
    flip_a_byte(image)
    keys = {"data_root": str(own_copy), "expected_patients": PATIENTS}
    assert BENCHMARK.check_data(config(BENCHMARK, **keys)) == []
    problems = BENCHMARK.check_data(config(BENCHMARK, **keys, full_check=True))
    assert len(problems) == 1 and image.name in problems[0]


def test_no_data_is_one_problem(tmp_path: Path) -> None:
    assert len(BENCHMARK.check_data(config(BENCHMARK, data_root=str(tmp_path / "nothing")))) == 1
    with pytest.raises(DataError, match="data_root"):
        BENCHMARK.prepare(config(BENCHMARK, data_root=str(tmp_path), work_dir=str(tmp_path / "work")))


def test_no_label_voxel_is_lost_and_a_perfect_prediction_is_perfect(download: Path, work: Path) -> None:
    task = BENCHMARK.resolve_task(config(BENCHMARK))
    cases = all_cases(download, work)[:4]
    assert len(cases) == 4
    for case in cases:
        prepared, stored = prepare_case(case, task), voxels_of(case.label)
        assert np.array_equal(np.bincount(prepared.label.ravel(), minlength=4)[1:], np.bincount(stored.ravel())[1:])
        inside = prepared.image != 0
        assert abs(prepared.image[inside].mean()) < 1e-3 and prepared.image[inside].std() == pytest.approx(1, abs=1e-3)
        rows = scored_rows(case, stored, stored, SPACING_MM, task)
        assert [row["class"] for row in rows] == ["RV", "MYO", "LV"]
        assert all(row["dice"] == 1.0 and row["hd95"] == 0.0 and row["nsd@2"] == 1.0 for row in rows)
        assert all(row["phase"] in ("ED", "ES") and row["group"] in ("NOR", "MINF") for row in rows)


def test_a_header_without_directions_still_gives_the_spacing(tmp_path: Path) -> None:
    voxels = np.arange(12 * 10 * 6, dtype=np.int16).reshape(12, 10, 6)
    image = nib.Nifti1Image(voxels, None)
    image.header.set_zooms((1.5, 1.25, 10.0))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "patient001_frame01.nii.gz")
    case = Case("patient001_frame01", "patient001", tmp_path / "patient001_frame01.nii.gz")
    prepared = prepare_case(case, BENCHMARK.resolve_task(config(BENCHMARK)))
    assert prepared.grid.stored_spacing_mm == pytest.approx((1.5, 1.25, 10.0))


def test_the_published_crop_is_that_of_the_z_score() -> None:
    assert BENCHMARK.resolve_task(config(BENCHMARK)).foreground_crop == "raw"
    assert BENCHMARK.resolve_task(config(BENCHMARK, protocol="reference")).foreground_crop == "reference_zscore"


def test_help_and_check_start_from_anywhere(tmp_path: Path) -> None:
    shown = start("ACDC", tmp_path, "--help")
    assert shown.code == 0 and "official_test" in shown.out and "--check-data" in shown.out
    refused = start("ACDC", tmp_path, "--check-data", "with", f"data_root={tmp_path}")
    assert refused.code == 2 and "data_root" in refused.told and "Traceback" not in refused.told


@pytest.mark.slow
def test_twenty_steps_on_one_case_lower_the_loss(download: Path, work: Path) -> None:
    import torch

    from mg3d.models.finetune.segmentation import build_segmentation_module

    keys = {"feature_size": 12, "roi": [64, 64, 32], "augment": False, "crops_per_volume": 1, "max_steps": 20}
    cfg = config(BENCHMARK, **keys)
    task = BENCHMARK.resolve_task(cfg)
    torch.manual_seed(0)
    module = build_segmentation_module(cfg, task, 20)
    images, labels = draw_crops(prepare_case(all_cases(download, work)[0], task), task, np.random.default_rng(0))
    image, label = torch.from_numpy(images)[:, None], torch.from_numpy(labels)[:, None]
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module.loss(module(image), label)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0], losses


@pytest.mark.slow
def test_the_phantom_run_leaves_a_table_by_structure_and_phase(tmp_path: Path) -> None:
    answer = run_phantom("ACDC", tmp_path).answer
    run_dir = Path(answer["run_dir"])
    frames = {path.name.replace("_0000.nii.gz", ""): path for path in (tmp_path / "work").rglob("imagesTr/*.nii.gz")}
    assert_complete(run_dir, frames, labels=3)
    metrics, rows = metrics_of(run_dir), rows_of(run_dir)
    for name in ("dice", "hd95", "dice/phase=ED", "hd95/phase=ES"):
        assert set(metrics[name]["per_class"]) == {"RV", "MYO", "LV"}
    assert metrics["protocol"] == "clean" and metrics["cases"]["test"] * 3 == len(rows)
    assert {row["phase"] for row in rows} == {"ED", "ES"} and {row["class"] for row in rows} == {"RV", "MYO", "LV"}
    assert answer["dice"] == pytest.approx(metrics["dice"]["mean"])


def _empty_frames(folder: Path, groups: list[str]) -> Path:
    """The names of a prepared data set, without content."""
    tags = {}
    (folder / "imagesTr").mkdir(parents=True)
    for number, group in enumerate(groups, start=1):
        for phase, frame in (("ED", 1), ("ES", 8 + number % 7)):
            name = f"patient{number:03d}_frame{frame:02d}"
            (folder / "imagesTr" / f"{name}_0000.nii.gz").touch()
            tags[name] = {"phase": phase, "group": group}
    (folder / "cases.json").write_text(json.dumps(tags), encoding="utf-8")
    return folder
