"""CC-CCII: layout of the phantom, slices to arrays, published and own splits, crops, votes, check of a download."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from entry import metrics_of, rows_of, start
from folders import config, load_folder
from PIL import Image

from mg3d.errors import ConfigError, DataError
from mg3d.files import read_csv, write_csv
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.scan_lists import COLUMNS
from mg3d.finetuning.splits import leakage_report
from mg3d.phantoms.downstream.cc_ccii import CLASSES, SPLIT_COLUMNS, write_cc_ccii
from mg3d.scans.slice_series import find_series, series_to_array

ccii = load_folder("cc-ccii")
BENCHMARK = ccii.BENCHMARK
PATIENTS = 6


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ccii") / "download"
    write_cc_ccii(root, patients=PATIENTS, size=32, slices=(5, 9), folds=3, seed=0)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """Nine scans as arrays of the published size, with split tables of the true columns."""
    root, rng = tmp_path_factory.mktemp("ccii_arrays"), np.random.default_rng(0)
    cfg = config(BENCHMARK, data_root=str(root / "raw"), work_dir=str(root / "work"), depth=16)
    folder = ccii.arrays_folder(cfg)
    folder.mkdir(parents=True)
    rows = []
    for number in range(9):
        target, patient, scan = number % 3, 100 + number, 7000 + number
        np.save(folder / f"p{patient}-s{scan}.npy", rng.integers(0, 256, (16, 512, 512), dtype=np.uint8))
        rows.append((f"{CLASSES[target]}-1.zip", target, CLASSES[target], patient, scan, 60, 1, f"[{scan}]"))
    for fold in range(3):
        held = rows[3 * fold : 3 * fold + 3]
        write_csv(root / "raw" / f"CC_CCII_fold{fold}_valid.csv", SPLIT_COLUMNS, held)
        write_csv(
            root / "raw" / f"CC_CCII_fold{fold}_train.csv", SPLIT_COLUMNS, [row for row in rows if row not in held]
        )
    return cfg


def ids(cases: object) -> set[str]:
    return {case.id for case in cases}  # type: ignore[attr-defined]


def test_the_phantom_has_the_published_layout(download: Path) -> None:
    archives = sorted(path.name for path in download.glob("*.zip"))
    assert archives == [f"{label}-{part}.zip" for label in ("CP", "NCP", "Normal") for part in (1, 2)]
    with zipfile.ZipFile(download / "NCP-1.zip") as archive:
        label, patient, scan, name = archive.namelist()[0].split("/")
        assert (label, name) == ("NCP", "0000.png") and patient.isdigit() and scan.isdigit()
        picture = Image.open(io.BytesIO(archive.read(archive.namelist()[0])))
        assert picture.size == (32, 32) and picture.mode == "L"
    rows = read_csv(download / "CC_CCII_fold0_train.csv", SPLIT_COLUMNS).rows
    assert tuple(rows[0]) == SPLIT_COLUMNS


def test_preparation_gives_one_array_a_scan_and_lists_them(download: Path, tmp_path: Path) -> None:
    keys = {"data_root": str(download), "depth": 8, "image_size": 40, "num_workers": 0}
    cfg = config(BENCHMARK, work_dir=str(tmp_path / "work"), **keys)
    BENCHMARK.prepare(cfg)
    folder = ccii.arrays_folder(cfg)
    rows = read_csv(folder / "scans.csv", COLUMNS).rows
    assert len(rows) == 3 * (PATIENTS + 2) == len(list(folder.glob("*.npy")))
    array = np.load(folder / f"p{rows[0]['patient_id']}-s{rows[0]['scan_id']}.npy")
    assert array.shape == (8, 40, 40) and array.dtype == np.uint8 and array.max() > 100
    published = {name: row for fold in range(3) for name, row in tables_of(download, fold).items()}
    assert {(row["label"], row["target"], row["n_slice"]) for row in rows} <= {
        (row["label"], row["target"], row["n_slice"]) for row in published.values()
    }
    unpacked = tmp_path / "unpacked"
    for path in download.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(unpacked / path.stem)
    other = config(BENCHMARK, work_dir=str(tmp_path / "other"), **{**keys, "data_root": str(unpacked)})
    BENCHMARK.prepare(other)
    for path in folder.glob("*.npy"):  # packed or unpacked, the same arrays
        assert np.array_equal(np.load(path), np.load(ccii.arrays_folder(other) / path.name))


def tables_of(root: Path, fold: int) -> dict[str, dict[str, str]]:
    return {row["scan_id"]: row for row in read_csv(root / f"CC_CCII_fold{fold}_valid.csv", SPLIT_COLUMNS).rows}


def test_slices_are_ordered_by_number_and_depth_is_resampled(tmp_path: Path) -> None:
    folder = tmp_path / "Normal" / "1" / "2"
    folder.mkdir(parents=True)
    for number in range(12):  # 0 ... 11 without leading zeros
        Image.fromarray(np.full((4, 4), 20 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    (series,) = find_series(tmp_path)
    assert series.parts == ("Normal", "1", "2") and len(series.slices) == 12
    assert series_to_array(series, 12, 4)[:, 0, 0].tolist() == [20 * number for number in range(12)]
    assert series_to_array(series, 6, 4)[:, 0, 0].tolist() == [10, 50, 90, 130, 170, 210]  # between two slices
    assert series_to_array(series, 6, 4, "index")[:, 0, 0].tolist() == [0, 40, 80, 140, 180, 220]
    assert series_to_array(series, 24, 8).shape == (24, 8, 8)


def test_a_bad_slice_costs_one_scan(own_copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(own_copy / "NCP-3.zip", "w") as archive:
        archive.writestr("NCP/7/8/0000.png", b"no picture")
    cfg = config(BENCHMARK, data_root=str(own_copy), work_dir=str(tmp_path), depth=4, image_size=16, num_workers=0)
    BENCHMARK.prepare(cfg)
    failures = json.loads((ccii.arrays_folder(cfg) / "failures.json").read_text(encoding="utf-8"))
    assert list(failures) == ["p7-s8"] and "0000.png" in failures["p7-s8"]
    assert len(list(ccii.arrays_folder(cfg).glob("*.npy"))) == 3 * (PATIENTS + 2)


def test_published_tables_are_read_from_the_download(arrays: FinetuneConfig) -> None:
    for fold in range(3):
        places = {"data_root": arrays.data_root, "work_dir": arrays.work_dir, "depth": 16, "fold": fold}
        reference = BENCHMARK.splits(config(BENCHMARK, **places, protocol="reference"))
        assert (len(reference.train), len(reference.val)) == (6, 3) and reference.val == reference.test
        assert "selection = reporting" in reference.notes
    clean = BENCHMARK.splits(arrays)
    assert (len(clean.train), len(clean.val), len(clean.test)) == (5, 1, 3) and leakage_report(clean) == ()


def test_tables_that_are_no_partition_are_used_as_they_are_and_noted(tmp_path: Path) -> None:
    """As in the published tables no patient is in both halves of a fold, but the valid halves overlap."""
    tables, cfg = tmp_path / "tables", config(BENCHMARK, work_dir=str(tmp_path), split_dir=str(tmp_path / "tables"))
    folder = ccii.arrays_folder(cfg)
    folder.mkdir(parents=True)
    rows = []
    for number in range(60):
        target, patient = number % 3, 100 + number // 2
        (folder / f"p{patient}-s{7000 + number}.npy").touch()
        rows.append((f"{CLASSES[target]}-1.zip", target, CLASSES[target], patient, 7000 + number, 60, 2, "[]"))
    for fold in range(3):
        held = [*rows[:12], *rows[12 + 12 * fold : 24 + 12 * fold]]
        for part, chosen in {"train": [row for row in rows if row not in held], "valid": held}.items():
            write_csv(tables / f"CC_CCII_fold{fold}_{part}.csv", SPLIT_COLUMNS, chosen)
    for fold in range(3):
        keys = {"work_dir": str(tmp_path), "split_dir": str(tables), "fold": fold}
        reference = BENCHMARK.splits(config(BENCHMARK, **keys, protocol="reference"))
        assert (len(reference.train), len(reference.test)) == (36, 24) and len(ids(reference.train)) == 36
        assert not {case.patient for case in reference.train} & {case.patient for case in reference.test}
        clean = BENCHMARK.splits(config(BENCHMARK, **keys))
        assert clean.test == reference.test and ids(clean.train) | ids(clean.val) == ids(reference.train)
        assert leakage_report(clean) == () and any("12 scans are in every valid table" in note for note in clean.notes)


@pytest.mark.realdata
def test_the_published_tables_have_their_known_sizes(shared_dir: Path, tmp_path: Path) -> None:
    tables = shared_dir / "data" / "splits"
    wanted = {0: (2514, 1664), 1: (2515, 1663), 2: (2517, 1661)}
    cfg = config(BENCHMARK, work_dir=str(tmp_path), split_dir=str(tables))
    folder = ccii.arrays_folder(cfg)
    folder.mkdir(parents=True)
    for part in ("train", "valid"):
        for row in read_csv(tables / f"CC_CCII_fold0_{part}.csv", SPLIT_COLUMNS).rows:
            (folder / f"p{row['patient_id']}-s{row['scan_id']}.npy").touch()
    valid = []
    for fold, sizes in wanted.items():
        keys = {"work_dir": str(tmp_path), "split_dir": str(tables), "fold": fold}
        reference = BENCHMARK.splits(config(BENCHMARK, **keys, protocol="reference"))
        assert (len(reference.train), len(reference.test)) == sizes
        assert not {case.patient for case in reference.train} & {case.patient for case in reference.test}
        assert len(ids(reference.train) | ids(reference.test)) == 4178
        clean = BENCHMARK.splits(config(BENCHMARK, **keys))
        assert clean.test == reference.test and ids(clean.train) | ids(clean.val) == ids(reference.train)
        assert leakage_report(clean) == () and len({case.stratum for case in clean.val}) == 3
        assert any("405 scans are in every valid table" in note for note in clean.notes)
        valid.append(ids(reference.test))
    assert len(valid[0] & valid[1] & valid[2]) == 405


def test_without_tables_patients_are_dealt_into_folds(download: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in download.glob("*.zip"):
        shutil.copy(path, bare)
    keys = {"data_root": str(bare), "work_dir": str(tmp_path / "work"), "depth": 4, "image_size": 16, "num_workers": 0}
    BENCHMARK.prepare(config(BENCHMARK, **keys))
    tested: list[str] = []
    for fold in range(3):
        parts = BENCHMARK.splits(config(BENCHMARK, **keys, fold=fold))
        assert leakage_report(parts) == ()
        assert {case.stratum for case in parts.train} == {case.stratum for case in parts.test} == set(CLASSES)
        assert len({case.patient for case in parts.val}) == 2  # of twelve training patients
        tested += sorted(ids(parts.test))
    assert len(tested) == len(set(tested)) == 3 * (PATIENTS + 2)


def test_a_split_folder_without_tables_is_refused(arrays: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split_dir"):
        BENCHMARK.splits(config(BENCHMARK, data_root=arrays.data_root, split_dir=str(tmp_path)))


def test_validation_sees_the_centre_and_training_is_near_it(arrays: FinetuneConfig) -> None:
    from mg3d.datasets.classification import ClassificationDataset

    task = BENCHMARK.resolve_task(arrays)
    cases = BENCHMARK.splits(config(BENCHMARK, data_root=arrays.data_root, work_dir=arrays.work_dir, depth=16,
                                    protocol="reference")).test  # fmt: skip
    dataset = ClassificationDataset(cases, task, arrays, train=False)
    image = dataset[0].image
    assert image.shape == (1, 16, 384, 384) and float(image.min()) >= 0 and float(image.max()) <= 1
    stored = ccii.load(cases[0], arrays)
    assert np.array_equal(image[0].numpy(), stored[:, 64:448, 64:448]) and np.array_equal(dataset[0].image, image)


def test_training_crops_are_jittered_by_at_most_18_pixels(
    arrays: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccii, "BRIGHTNESS", 0)
    monkeypatch.setattr(ccii, "CONTRAST", 0)
    rows, columns = np.meshgrid(np.arange(512), np.arange(512), indexing="ij")
    depth = np.arange(16)[:, None, None]
    scan = ((depth * 512 + rows) * 512 + columns).astype(np.float64) / (16 * 512 * 512)
    seen = []
    for seed in range(30):
        crop = ccii.augment(scan, np.random.default_rng(seed), arrays)
        assert crop.shape == (16, 384, 384)
        index = np.rint(crop.astype(np.float64) * (16 * 512 * 512)).astype(np.int64)
        flipped = index[0, 0, 0] > index[0, 0, -1]
        assert np.array_equal(index[:, 100, 100] // 512**2, np.arange(16))  # the order of the slices stays
        corner = index[0, 0, -1 if flipped else 0]
        left = (512 - 384 - corner % 512) if flipped else corner % 512
        seen.append((bool(flipped), int(corner // 512 % 512) - 64, int(left) - 64))
    offsets = [abs(value) for _, *pair in seen for value in pair]
    assert max(offsets) <= 18 and max(offsets) > 9 and len(set(seen)) > 20
    assert {flipped for flipped, *_ in seen} == {True, False}


def test_the_flip_is_left_to_right_and_by_depth_only_in_reference(arrays: FinetuneConfig) -> None:
    scan = np.zeros((16, 512, 512), dtype=np.float32)
    scan[2, 256, 100] = 0.9
    reference = config(BENCHMARK, protocol="reference", depth=16)
    places = {"clean": set(), "reference": set()}
    for seed in range(12):
        for cfg in (arrays, reference):
            found = np.argwhere(ccii.augment(scan, np.random.default_rng(seed), cfg) > 0.5)
            z, _, x = found[0].tolist()
            places[cfg.protocol].add((z, x > 192))
    assert places == {"clean": {(2, False), (2, True)}, "reference": {(2, False), (13, False)}}


def test_patients_vote(arrays: FinetuneConfig) -> None:
    names = ["p1-s1", "p1-s2", "p1-s3", "p2-s4"]
    probs = np.asarray([[0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.5, 0.4, 0.1], [0.2, 0.1, 0.7]])
    found = BENCHMARK.task.entries(names, probs, np.asarray([[1], [1], [1], [2]]), 40, 0)
    assert {name: entry["mean"] for name, entry in found.items()} == {
        "patient_accuracy_mean": 1.0,
        "patient_accuracy_majority": 0.5,
    }
    assert found["patient_accuracy_majority"]["ci95"] == [0.0, 1.0]


def test_figures_of_a_fixed_confusion() -> None:
    from mg3d.models.finetune.figures import figures

    # rows truth, columns prediction: [[3, 1, 0], [1, 2, 1], [0, 0, 2]]
    pairs = [(0, 0)] * 3 + [(0, 1), (1, 0)] + [(1, 1)] * 2 + [(1, 2)] + [(2, 2)] * 2
    truth = np.asarray([[target] for target, _ in pairs])
    probs = np.full((10, 3), 0.2)
    for row, (_, predicted) in enumerate(pairs):
        probs[row, predicted] = 0.6
    found = figures(BENCHMARK.task, [f"p{k}-s0" for k in range(10)], probs, truth)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["macro_f1"] == pytest.approx((0.75 + 4 / 7 + 0.8) / 3)
    assert found["auroc"] == pytest.approx((19 / 24 + 2 / 3 + 15 / 16) / 3)  # one class against the rest, by hand


def test_everything_wrong_is_listed_at_once(download: Path, own_copy: Path) -> None:
    assert BENCHMARK.check_data(config(BENCHMARK, data_root=str(download))) == []
    (own_copy / "NCP-1.zip").unlink()
    table = own_copy / "CC_CCII_fold0_train.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(",Normal,", ",CP,", 1), encoding="utf-8")
    found = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy)))
    lost = {
        name for fold in range(3) for name, row in tables_of(download, fold).items() if row["zip_file"] == "NCP-1.zip"
    }
    assert len(found) >= len(lost) and sum("0 slices of" in line for line in found) == len(lost)
    assert all("mend:" in line for line in found)
    (own_copy / "CP-1.zip").write_bytes(b"half a file")
    assert "CP-1.zip" in BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy)))[0]
    empty = config(BENCHMARK, data_root=str(own_copy / "nothing"))
    assert "4178 are published" in BENCHMARK.check_data(empty)[0]
    with pytest.raises(DataError, match="no zip file"):
        BENCHMARK.prepare(empty)


def test_the_full_check_decodes_every_slice(own_copy: Path) -> None:
    with zipfile.ZipFile(own_copy / "NCP-3.zip", "w") as archive:
        archive.writestr("NCP/7/8/0000.png", b"no picture")
    assert BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy))) == []
    found = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy), full_check=True))
    assert len(found) == 1 and "NCP/7/8/0000.png" in found[0]


@pytest.mark.smoke
@pytest.mark.slow
def test_the_phantom_run_from_another_folder(tmp_path: Path) -> None:
    write_cc_ccii(tmp_path / "in", patients=4, size=32, slices=(5, 9))
    words = [
        f"{key}={tmp_path / place}" for key, place in (("data_root", "in"), ("work_dir", "work"), ("log_dir", "out"))
    ]
    few = ("max_epoch=1", "depth=14", "image_size=32", "crop=28", "bootstrap_rounds=20", "num_gpus=0", "num_threads=1")
    done = start("cc-ccii", tmp_path, "with", "phantom", *words, *few)
    assert done.code == 0, done.told[-3000:]
    run_dir = Path(done.answer["run_dir"])
    metrics, rows = metrics_of(run_dir), rows_of(run_dir)
    assert {"accuracy", "macro_f1", "macro_auroc", "patient_accuracy_mean", "patient_accuracy_majority"} <= set(metrics)
    assert metrics["confusion"]["classes"] == list(CLASSES) and sum(map(sum, metrics["confusion"]["counts"])) == len(
        rows
    )
    for row in rows:
        assert sum(float(row[f"prob_{name}"]) for name in CLASSES) == pytest.approx(1.0) and row["target"] in "012"
    assert metrics["patient_accuracy_mean"]["n"] == len({row["patient"] for row in rows}) < len(rows)
