"""STOIC 2021: layout of the phantom, preparation, fixed test part, severity among the positive, check of a download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from entry import metrics_of, rows_of, start
from folders import config, load_folder

from mg3d.datasets.fitting import resize_linear, window_to_unit
from mg3d.errors import DataError
from mg3d.files import read_csv
from mg3d.finetuning.config import FinetuneConfig
from mg3d.phantoms.downstream.meta_image import write_mha
from mg3d.phantoms.downstream.stoic2021 import REFERENCE_COLUMNS, write_stoic2021

stoic, preparation = load_folder("stoic2021"), load_folder("stoic2021", "prepare")
BENCHMARK = stoic.BENCHMARK
PATIENTS = 30
SIZE = [32, 32, 32]


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stoic") / "download"
    write_stoic2021(root, patients=PATIENTS, shape=(32, 32, 32), seed=0)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


@pytest.fixture(scope="module")
def stand_ins(download: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """A config whose prepared arrays are empty files: enough for the splits."""
    cfg = config(BENCHMARK, data_root=str(download), work_dir=str(tmp_path_factory.mktemp("stoic_work")))
    folder = stoic.arrays_folder(cfg)
    folder.mkdir(parents=True)
    for path in (download / "data" / "mha").iterdir():
        (folder / f"{path.stem}.npy").touch()
    return cfg


def test_the_phantom_has_the_published_layout(download: Path) -> None:
    rows = read_csv(download / "metadata" / "reference.csv", REFERENCE_COLUMNS).rows
    assert tuple(rows[0]) == ("PatientID", "probCOVID", "probSevere") and len(rows) == PATIENTS
    assert {(row["probCOVID"], row["probSevere"]) for row in rows} == {("0", "0"), ("1", "0"), ("1", "1")}
    image = SimpleITK.ReadImage(str(download / "data" / "mha" / f"{rows[0]['PatientID']}.mha"))
    assert image.GetSize() == (32, 32, 32) and {"PatientAge", "PatientSex"} <= set(image.GetMetaDataKeys())


@pytest.mark.parametrize(("length", "first"), [(300, 60), (240, 0)])
def test_reference_keeps_the_last_240_slices(length: int, first: int) -> None:
    hu = np.broadcast_to(np.arange(length, dtype=np.float32)[:, None, None], (length, 2, 2))
    box = preparation.fit_box(hu, published=True)
    assert box.shape == (240, 240, 240)
    assert box[:, 119, 119].tolist() == list(range(first, first + 240))


def test_reference_fills_with_water_and_clean_with_air() -> None:
    hu = np.full((100, 240, 240), 200.0, dtype=np.float32)
    published = window_to_unit(preparation.fit_box(hu, published=True), preparation.WINDOW_HU)
    assert np.all(published[:140] == np.float32(1100 / 1400)) and round(float(published[0, 0, 0]), 6) == 0.785714
    assert np.all(published[140:] > 0.92)
    clean = window_to_unit(preparation.fit_box(hu), preparation.WINDOW_HU)
    assert np.all(clean[:70] == 0) and np.all(clean[-70:] == 0) and np.all(clean[70:170] > 0.92)  # centred


def test_the_window() -> None:
    hu = np.asarray([-2000.0, -1100.0, -400.0, 300.0, 3000.0])
    assert window_to_unit(hu, preparation.WINDOW_HU).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_resizing_agrees_with_torch() -> None:
    import torch
    from torch.nn import functional

    volume = np.random.default_rng(0).random((7, 12, 9), dtype=np.float32)
    for size in ((5, 20, 9), (14, 6, 4), (1, 12, 30)):
        wanted = functional.interpolate(torch.from_numpy(volume)[None, None], size=size, mode="trilinear")[0, 0].numpy()
        assert np.allclose(resize_linear(volume, size), wanted, atol=1e-6)


def test_a_scan_becomes_the_networks_array_in_canonical_order(tmp_path: Path) -> None:
    hu = np.full((60, 50, 40), -1000, dtype=np.int16)
    hu[40:50, 10:20, 5:15] = 300  # high, in front, to the right of the patient
    write_mha(tmp_path / "1.mha", hu, (4.0, 4.8, 4.8), (0, 0, 0), {})
    array = preparation.scan_to_array(tmp_path / "1.mha", (60, 60, 60))
    assert array.shape == (60, 60, 60) and array.dtype == np.float16
    centre = np.argwhere(array > 0.5).mean(axis=0)
    world = (np.asarray([44.5, 14.5, 9.5]) - (np.asarray(hu.shape) - 1) / 2) * (4.0, 4.8, 4.8)  # mm from the centre
    assert np.allclose((centre - 29.5) * 6.4, world, atol=3.2)
    assert float(array[0, 0, 0]) == 0.0  # air outside
    image = SimpleITK.ReadImage(str(tmp_path / "1.mha"))
    turned = SimpleITK.Flip(image, (True, True, False), False)
    SimpleITK.WriteImage(turned, str(tmp_path / "2.mha"))
    assert np.array_equal(preparation.scan_to_array(tmp_path / "2.mha", (60, 60, 60)), array)
    assert not np.array_equal(preparation.scan_to_array(tmp_path / "2.mha", (60, 60, 60), published=True), array)


def test_preparation_goes_on_after_a_bad_scan(own_copy: Path, tmp_path: Path) -> None:
    for path in sorted((own_copy / "data" / "mha").iterdir())[6:]:
        path.unlink()
    bad = sorted((own_copy / "data" / "mha").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:-2000])
    cfg = config(BENCHMARK, data_root=str(own_copy), work_dir=str(tmp_path / "work"), roi=SIZE, num_workers=0)
    BENCHMARK.prepare(cfg)
    folder = stoic.arrays_folder(cfg)
    assert len(list(folder.glob("*.npy"))) == 5 and not (folder / f"{bad.stem}.npy").exists()
    assert list(json.loads((folder / "failures.json").read_text(encoding="utf-8"))) == [bad.stem]
    again = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    BENCHMARK.prepare(cfg)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")} == again
    assert BENCHMARK.resolve_task(cfg).size_dhw == (32, 32, 32)


def test_patients_are_in_one_part_with_all_strata(stand_ins: FinetuneConfig) -> None:
    tests, validated = set(), []
    for fold in range(3):
        parts = BENCHMARK.splits(
            config(BENCHMARK, data_root=stand_ins.data_root, work_dir=stand_ins.work_dir, fold=fold)
        )
        train, val, test = ({case.id for case in part} for part in (parts.train, parts.val, parts.test))
        assert not train & val and not train & test and not val & test and len(train | val | test) == PATIENTS
        assert all(len({case.stratum for case in part}) == 3 for part in (parts.train, parts.val, parts.test))
        tests.add(frozenset(test))
        validated += sorted(val)
    assert len(tests) == 1 and len(validated) == len(set(validated)) == PATIENTS - len(next(iter(tests)))


def test_another_split_seed_and_the_note_of_reference(stand_ins: FinetuneConfig) -> None:
    places = {"data_root": stand_ins.data_root, "work_dir": stand_ins.work_dir}
    other = BENCHMARK.splits(config(BENCHMARK, **places, split_seed=5))
    assert {case.id for case in other.test} != {case.id for case in BENCHMARK.splits(stand_ins).test}
    assert BENCHMARK.splits(stand_ins) == BENCHMARK.splits(config(BENCHMARK, **places, seed=9))


def test_severity_is_judged_among_the_positive() -> None:
    covid, severe = [1, 1, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0, 0]
    p_covid, p_severe = [0.9, 0.6, 0.4, 0.8, 0.3, 0.55, 0.7, 0.2], [0.8, 0.3, 0.45, 0.5, 0.1, 0.6, 0.2, 0.05]
    probs, targets = np.stack([p_covid, p_severe], axis=1), np.stack([covid, severe], axis=1)
    found = BENCHMARK.task.entries([str(k) for k in range(8)], probs, targets, 50, 0)
    wanted = {"accCOVID": 0.75, "aucCOVID": 0.933333, "accSevere": 0.6, "aucSevere": 0.833333}
    assert {name: round(entry["mean"], 6) for name, entry in found.items()} == wanted
    assert BENCHMARK.task.monitor in wanted


def test_result_table(tmp_path: Path) -> None:
    rows = [{"id": "7", "patient": "7", "prob_COVID": 0.75, "prob_Severe": 0.25}]
    BENCHMARK.write_results(config(BENCHMARK), tmp_path, rows)
    assert (tmp_path / "result.csv").read_text(encoding="utf-8") == "PatientID,probCOVID,probSevere\n7,0.75,0.25\n"


def test_random_changes_keep_the_range() -> None:
    scan = np.random.default_rng(0).random((8, 8, 8), dtype=np.float32)
    cfg = config(BENCHMARK, noise=0.0)
    changed = {stoic.augment(scan, np.random.default_rng(seed), cfg).tobytes() for seed in range(8)}
    assert changed == {scan.tobytes(), np.flip(scan, 2).tobytes()}  # left and right alone
    noisy = stoic.augment(scan, np.random.default_rng(1), config(BENCHMARK))
    assert noisy.min() >= 0 and noisy.max() <= 1 and noisy.dtype == np.float32


def test_everything_wrong_is_listed_at_once(download: Path, own_copy: Path) -> None:
    assert BENCHMARK.check_data(config(BENCHMARK, data_root=str(download), complete=False)) == []
    assert "2000 are published" in BENCHMARK.check_data(config(BENCHMARK, data_root=str(download)))[0]
    first, second, *_ = sorted((own_copy / "data" / "mha").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-500])
    shutil.copy(sorted((own_copy / "data" / "mha").iterdir())[3], own_copy / "data" / "mha" / "9999.mha")
    found = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy), complete=False))
    assert len(found) == 3 and all("mend:" in line for line in found)
    for word in (first.name, second.name, "9999.mha"):
        assert any(word in line for line in found), found


def test_a_changed_byte_is_found_by_the_full_check(own_copy: Path) -> None:
    path = sorted((own_copy / "data" / "mha").iterdir())[4]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))
    quick = config(BENCHMARK, data_root=str(own_copy), complete=False)
    full = config(BENCHMARK, data_root=str(own_copy), complete=False, full_check=True)
    assert BENCHMARK.check_data(quick) == []
    assert [path.name in line for line in BENCHMARK.check_data(full)] == [True]


def test_outcomes_other_than_0_and_1_are_refused(own_copy: Path) -> None:
    table = own_copy / "metadata" / "reference.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("1,1,0\n", "1,0.4,0\n", 1), encoding="utf-8")
    assert "0 or 1" in BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy)))[0]
    with pytest.raises(DataError, match="row 2"):
        BENCHMARK.splits(config(BENCHMARK, data_root=str(own_copy)))


@pytest.mark.slow
def test_the_phantom_run_from_another_folder(tmp_path: Path) -> None:
    write_stoic2021(tmp_path / "in", patients=24, shape=(32, 32, 32))
    words = [
        f"{key}={tmp_path / place}" for key, place in (("data_root", "in"), ("work_dir", "work"), ("log_dir", "out"))
    ]
    few = ("max_epoch=1", "roi=[28,28,28]", "bootstrap_rounds=20", "num_gpus=0", "num_threads=1")
    done = start("stoic2021", tmp_path, "with", "phantom", *words, *few)
    assert done.code == 0, done.told[-3000:]
    run_dir = Path(done.answer["run_dir"])
    metrics, rows = metrics_of(run_dir), rows_of(run_dir)
    assert {"accCOVID", "aucCOVID", "accSevere", "aucSevere"} <= set(metrics) and sum(metrics["cases"].values()) == 24
    assert set(metrics["auroc"]["per_class"]) == {"COVID", "Severe"}
    parts = json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))
    assert not set(parts["train"]) & set(parts["val"]) and not set(parts["train"]) & set(parts["test"])
    table = read_csv(run_dir / "result.csv", ("PatientID", "probCOVID", "probSevere")).rows
    assert [row["PatientID"] for row in table] == [row["id"] for row in rows] and len(rows) == len(parts["test"])
