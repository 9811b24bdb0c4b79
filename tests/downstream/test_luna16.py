"""LUNA16: layout of the phantom, cubes, subsets as splits, balanced epochs, FROC, the check of a download."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from entry import metrics_of, rows_of, start
from folders import config, load_folder

from mg3d.datasets.fitting import clamped_start
from mg3d.errors import ConfigError, DataError
from mg3d.files import read_csv
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.splits import permuted_labels
from mg3d.metrics.classification import auroc
from mg3d.phantoms.downstream.luna16 import ANNOTATION_COLUMNS, CANDIDATE_COLUMNS, write_luna16
from mg3d.scans.read import read_scan
from mg3d.scans.world_cubes import cubes_at, cut_cube, to_grey

luna = load_folder("Luna16")
BENCHMARK = luna.BENCHMARK
WINDOW = (-1000.0, 600.0)
NODULES, DECOYS = 3, 6


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("luna") / "download"
    write_luna16(root, subsets=(0, 3, 5, 7), scans=1, nodules=NODULES, decoys=DECOYS, shape=(56, 72, 72), seed=1)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


@pytest.fixture(scope="module")
def cfg(download: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    return prepared(download, tmp_path_factory.mktemp("luna_work"))


def prepared(root: Path, work: Path, **keys: object) -> FinetuneConfig:
    cfg = config(BENCHMARK, data_root=str(root), work_dir=str(work), complete=False, num_workers=0, **keys)
    BENCHMARK.prepare(cfg)
    return cfg


def cases_of(cfg: FinetuneConfig) -> list[Case]:
    parts = BENCHMARK.splits(cfg)
    return [*parts.train, *parts.val, *parts.test]


def subset_of(case: Case) -> str:
    return case.image.parent.name


def test_the_phantom_has_the_published_layout(download: Path) -> None:
    headers = sorted(download.glob("subset*/*.mhd"))
    assert [path.parent.name for path in headers] == ["subset0", "subset3", "subset5", "subset7"]
    assert all(path.with_suffix(".raw").is_file() for path in headers)
    candidates = read_csv(download / "candidates.csv", CANDIDATE_COLUMNS).rows
    assert tuple(candidates[0]) == CANDIDATE_COLUMNS
    assert tuple(read_csv(download / "annotations.csv", ANNOTATION_COLUMNS).rows[0]) == ANNOTATION_COLUMNS
    assert {row["seriesuid"] for row in candidates} == {path.stem for path in headers}
    assert sum(row["class"] == "1" for row in candidates) == 4 * NODULES
    assert read_scan(headers[-1]).voxels_xyz.shape == (72, 72, 40)  # thinner than a cube
    assert np.sign(np.diag(read_scan(headers[1]).affine))[:3].tolist() == [1, 1, 1]  # stored with x and y reversed


@pytest.mark.parametrize(
    ("centre", "start"),
    [((10, 500, 256), (0, 464, 232)), ((60, 20, 300), (36, 0, 276)), ((60, 256, 256), (36, 232, 232))],
)
def test_a_cube_starts_where_the_specification_says(centre: tuple[int, ...], start: tuple[int, ...]) -> None:
    shape = (120, 512, 512)
    assert tuple(clamped_start(c, n, 48) for c, n in zip(centre, shape, strict=True)) == start
    marked = np.zeros(shape, dtype=np.uint8)
    marked[start] = 255
    assert cut_cube(marked, np.asarray(centre), 48)[0, 0, 0] == 255


def test_the_window_is_fixed_whatever_a_scan_holds() -> None:
    for extremes in ([-3024.0, 2000.0], [-400.0, 100.0]):
        hu = np.asarray([-1000.0, 600.0, -200.0, *extremes])
        assert to_grey(hu, WINDOW)[:3].tolist() == [0, 255, 128]
    dim = np.asarray([-900.0, -500.0])
    assert to_grey(dim, WINDOW, extremes=True).tolist() == [0, 255]  # as published: equal HU differ between scans
    assert to_grey(dim, WINDOW).tolist() == [16, 80]


def test_cubes_are_8_bit_centred_and_in_the_order_of_the_table(download: Path, cfg: FinetuneConfig) -> None:
    rows = read_csv(download / "candidates.csv", CANDIDATE_COLUMNS).rows
    paths = sorted(luna.cubes_folder(cfg).glob("subset*/*.npy"))
    assert paths and any(case.targets == (1.0,) for case in cases_of(cfg))
    for path in paths:
        cubes = np.load(path)
        mine = [row["class"] for row in rows if row["seriesuid"] == path.stem]
        assert cubes.shape == (len(mine), 48, 48, 48) and cubes.dtype == np.uint8
    for case in cases_of(cfg):
        if case.targets == (1.0,):  # nodules lie in the inner part, in the scan with reversed axes too
            cube = luna.load(case, cfg)
            peaks = np.argwhere(cube[20:28, 20:28, 20:28] > 0.55)
            assert len(peaks) > 20 or subset_of(case) == "subset7" or at_border(case, download), case.id


def at_border(case: Case, root: Path) -> bool:
    """Whether the cube of a case was moved inside."""
    uid, _, row = case.id.rpartition("_")
    raw = read_scan(next(root.glob(f"subset*/{uid}.mhd")))
    place = luna.read_candidates(root)[uid].world_mm[int(row)]
    index = np.linalg.solve(raw.affine, [-place[0], -place[1], place[2], 1.0])[:3]
    return any(not 24 <= i <= n - 24 for i, n in zip(index, raw.voxels_xyz.shape, strict=True))


@pytest.mark.realdata
def test_a_real_nodule_lies_where_its_published_row_says(shared_dir: Path) -> None:
    place = np.asarray([[-57.44, 131.23, -520.36]])  # of annotations.csv, 15.49 mm
    scan = shared_dir / "data" / "ct" / "lidc_0314_chest_2mm.nii.gz"
    cube = cubes_at(read_scan(scan), place, 48, WINDOW)[0]
    readers = cubes_at(read_scan(scan.with_name("lidc_0314_chest_2mm_nodule_readers.nii.gz")), place, 48, (0.0, 4.0))[0]
    assert readers[24, 24, 24] == 255 and np.allclose(np.argwhere(readers == 255).mean(axis=0), 24, atol=1.5)
    assert cube[24, 24, 24] > 140 and cube[readers == 0].mean() < cube[readers == 255].mean() - 50  # solid, in the lung


def test_a_nodule_lies_where_its_row_says_whatever_the_axes(tmp_path: Path) -> None:
    place = np.asarray([-57.44, 131.23, -520.36])
    axes = np.meshgrid(*(start + 2.0 * np.arange(64) for start in (-110.0, 70.0, -590.0)), indexing="ij")
    distance = np.sqrt(sum((axis - middle) ** 2 for axis, middle in zip(axes, place, strict=True)))
    hu = np.where(distance < 7.7, 40, -850).astype(np.int16)  # x, y, z in LPS
    affine = np.array([[-2.0, 0, 0, 110], [0, -2.0, 0, -70], [0, 0, 2.0, -590], [0, 0, 0, 1]])
    image = nib.Nifti1Image(hu, affine)
    nib.save(image, tmp_path / "lps.nii.gz")
    nib.save(nib.as_closest_canonical(image), tmp_path / "ras.nii.gz")
    for name in ("lps.nii.gz", "ras.nii.gz"):
        cube = cubes_at(read_scan(tmp_path / name), place[None], 48, WINDOW)[0]
        assert np.allclose(np.argwhere(cube > 140).mean(axis=0), 24, atol=1.0) and cube[24, 24, 24] > 140


def test_a_thin_scan_is_filled_with_air_on_both_sides(cfg: FinetuneConfig) -> None:
    path = next(luna.cubes_folder(cfg).glob("subset7/*.npy"))
    cubes = np.load(path)
    assert not cubes[:, :4].any() and not cubes[:, -4:].any() and cubes[:, 4:-4].any(axis=(2, 3)).all()


def test_candidates_at_the_corners_have_full_cubes(cfg: FinetuneConfig) -> None:
    assert all(luna.load(case, cfg).shape == (48, 48, 48) for case in cases_of(cfg))
    values = np.concatenate([luna.load(case, cfg).ravel() for case in cases_of(cfg)[:5]])
    assert values.dtype == np.float32 and values.min() >= 0 and 0 < values.max() <= 1


def test_a_bad_scan_is_reported_and_the_rest_is_kept(own_copy: Path, tmp_path: Path) -> None:
    broken = next(own_copy.glob("subset5/*.raw"))
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    first = prepared(own_copy, tmp_path / "work")
    folder = luna.cubes_folder(first)
    assert len(list(folder.glob("subset*/*.npy"))) == 3 and not list(folder.rglob("*.tmp"))
    failures = json.loads((folder / "failures.json").read_text(encoding="utf-8"))
    assert list(failures) == [f"subset5/{broken.stem}"] and broken.name in failures[f"subset5/{broken.stem}"]
    notes = BENCHMARK.splits(first).notes
    assert any("1 of 4 scans have no cubes" in note for note in notes)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("subset*/*.npy")}
    broken.write_bytes(content)
    prepared(own_copy, tmp_path / "work")
    after = {path: path.stat().st_mtime_ns for path in folder.glob("subset*/*.npy")}
    assert len(after) == 4 and before.items() <= after.items()  # resumed: what was there is untouched
    assert json.loads((folder / "failures.json").read_text(encoding="utf-8")) == {}


def test_other_settings_have_another_folder(download: Path, cfg: FinetuneConfig, own_copy: Path) -> None:
    def folder(root: Path, protocol: str) -> Path:
        return luna.cubes_folder(config(BENCHMARK, data_root=str(root), work_dir=cfg.work_dir, protocol=protocol))

    assert folder(download, "clean") == luna.cubes_folder(cfg) != folder(download, "reference")
    with (own_copy / "candidates.csv").open("a", encoding="utf-8") as file:
        file.write("1.2.3,0,0,0,0\n")
    assert folder(own_copy, "clean") != folder(download, "clean")


def test_a_place_far_outside_belongs_to_another_scan(own_copy: Path, tmp_path: Path) -> None:
    uid = next(own_copy.glob("subset0/*.mhd")).stem
    with (own_copy / "candidates.csv").open("a", encoding="utf-8") as file:
        file.write(f"{uid},4000,0,0,0\n")
    folder = luna.cubes_folder(prepared(own_copy, tmp_path / "work"))
    failures = json.loads((folder / "failures.json").read_text(encoding="utf-8"))
    assert "voxels outside" in failures[f"subset0/{uid}"]


def test_the_subset_decides_the_split(cfg: FinetuneConfig) -> None:
    parts = BENCHMARK.splits(cfg)
    assert {subset_of(case) for case in parts.train} == {"subset0", "subset3"}
    assert {subset_of(case) for case in parts.val} == {"subset5"} and {subset_of(c) for c in parts.test} == {"subset7"}
    assert len(parts.train) == 2 * (NODULES + DECOYS) and len({case.id for case in cases_of(cfg)}) == len(cases_of(cfg))
    other = config(
        BENCHMARK,
        data_root=cfg.data_root,
        work_dir=cfg.work_dir,
        train_subsets=[7],
        val_subsets=[0],
        test_subsets=[3, 5],
    )
    assert {subset_of(case) for case in BENCHMARK.splits(other).train} == {"subset7"}
    with pytest.raises(ConfigError, match="subset 0 is in two parts"):
        BENCHMARK.splits(config(BENCHMARK, data_root=cfg.data_root, work_dir=cfg.work_dir, val_subsets=[0]))


def test_epochs_are_balanced_and_negatives_change(cfg: FinetuneConfig) -> None:
    from mg3d.datamodules.classification import ClassificationDataModule

    def order(seed: int, epoch: int) -> np.ndarray:
        other = config(BENCHMARK, data_root=cfg.data_root, work_dir=cfg.work_dir, batch_size=2, seed=seed)
        module = ClassificationDataModule(other, BENCHMARK.resolve_task(other), BENCHMARK.splits(cfg))
        return module.train_dataloader().batch_sampler.order(epoch)

    train = BENCHMARK.splits(cfg).train
    drawn = order(0, 0)
    assert sorted(train[row].targets[0] for row in drawn) == [0.0] * 2 * NODULES + [1.0] * 2 * NODULES
    assert np.array_equal(drawn, order(0, 0))
    negatives = [{int(row) for row in order(0, epoch) if train[row].targets == (0.0,)} for epoch in range(4)]
    assert len({frozenset(rows) for rows in negatives}) > 1


def test_shuffled_labels_keep_their_number(cfg: FinetuneConfig) -> None:
    train = BENCHMARK.splits(cfg).train
    shuffled = permuted_labels(train)
    assert [case.id for case in shuffled] == [case.id for case in train]
    assert sum(case.targets == (1.0,) for case in shuffled) == 2 * NODULES
    assert [case.targets for case in shuffled] != [case.targets for case in train]


def test_random_changes_keep_range_and_turn_by_degrees(cfg: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy import ndimage

    angles: list[float] = []
    rotate = ndimage.rotate
    monkeypatch.setattr(
        ndimage, "rotate", lambda cube, angle, **kw: (angles.append(angle), rotate(cube, angle, **kw))[1]
    )
    cube = np.random.default_rng(0).random((48, 48, 48), dtype=np.float32)
    changed = [luna.augment(cube, np.random.default_rng(seed), cfg) for seed in range(24)]
    assert all(each.shape == cube.shape and each.min() >= 0 and each.max() <= 1.001 for each in changed)
    assert max(map(abs, angles)) <= 20 and max(map(abs, angles)) > 5 and len(angles) < 24
    assert np.array_equal(changed[3], luna.augment(cube, np.random.default_rng(3), cfg))


def test_result_tables(cfg: FinetuneConfig, tmp_path: Path) -> None:
    test = BENCHMARK.splits(cfg).test
    rows = [{"id": case.id, "target": int(case.targets[0]), "prob_nodule": case.targets[0]} for case in test]
    BENCHMARK.write_results(cfg, tmp_path, rows)
    with (tmp_path / "results_test.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == ("Index", "name", "gts", "preds") and len(table) == len(test)
    assert [row["Index"] for row in table] == [str(k) for k in range(len(test))]


def test_free_response_roc_of_the_test_scans(cfg: FinetuneConfig) -> None:
    parts = BENCHMARK.splits(cfg)
    test = [*parts.train, *parts.test]
    ids, truth = [case.id for case in test], np.asarray([case.targets for case in test])
    entries = BENCHMARK.resolve_task(cfg).entries
    perfect = entries(ids, truth, truth, 50, 0)
    assert set(perfect) == {"cpm", *(f"froc@{rate:g}" for rate in (0.125, 0.25, 0.5, 1, 2, 4, 8))}
    assert all(entry == {"mean": 1.0, "ci95": [1.0, 1.0], "n": 3} for entry in perfect.values())
    assert entries(ids, 1.0 - truth, truth, 0, 0)["froc@0.125"] == {"mean": 0.0, "ci95": None, "n": 3}


def test_auroc_of_constant_and_of_perfect_scores() -> None:
    truth = np.asarray([0, 1, 0, 1, 1])
    assert auroc(np.full(5, 0.3), truth) == 0.5 and auroc(truth.astype(float), truth) == 1.0


@pytest.mark.parametrize("encoder", ["swin_b", "swin_l", "unet"])
def test_a_prediction_does_not_depend_on_its_batch(cfg: FinetuneConfig, encoder: str) -> None:
    import torch

    from mg3d.models.finetune.classification import build_classification_module

    own = config(BENCHMARK, data_root=cfg.data_root, work_dir=cfg.work_dir, encoder=encoder, feature_size=12)
    torch.manual_seed(0)
    module = build_classification_module(own, BENCHMARK.resolve_task(own), 10).eval()
    images = torch.from_numpy(np.stack([luna.load(case, own) for case in BENCHMARK.splits(cfg).test[:3]]))[:, None]
    with torch.no_grad():
        together, alone = module.probabilities(images), module.probabilities(images[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-6)


def test_a_good_download_passes_and_an_incomplete_one_is_named(download: Path, cfg: FinetuneConfig) -> None:
    assert BENCHMARK.check_data(cfg) == []
    lines = BENCHMARK.check_data(config(BENCHMARK, data_root=str(download)))
    missing = [line for line in lines if "subset" in line and "missing" in line]
    assert len(missing) == 6 and any("4 scans, published are 888" in line for line in lines)
    assert any("551065" in line for line in lines) and all("mend:" in line for line in lines)


def test_everything_wrong_is_listed_at_once(own_copy: Path, cfg: FinetuneConfig) -> None:
    short, gone = next(own_copy.glob("subset0/*.raw")), next(own_copy.glob("subset5/*.raw"))
    short.write_bytes(short.read_bytes()[:-100])
    gone.unlink()
    next(own_copy.glob("subset7/*.mhd")).write_text("nonsense\n", encoding="utf-8")
    uid = next(own_copy.glob("subset3/*.mhd")).stem
    table = own_copy / "candidates.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(line for line in lines if uid not in line) + "\n", encoding="utf-8")
    found = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy), complete=False))
    assert len(found) == 4
    for word in (short.name, gone.name, "subset7", uid):
        assert sum(word in line for line in found) == 1, found
    (own_copy / "annotations.csv").write_text("seriesuid,coordX\n", encoding="utf-8")
    found = BENCHMARK.check_data(config(BENCHMARK, data_root=str(own_copy), complete=False))
    assert any("annotations.csv" in line and "diameter_mm" in line for line in found)


def test_an_empty_place_is_refused(tmp_path: Path) -> None:
    nowhere = config(BENCHMARK, data_root=str(tmp_path / "nothing"), work_dir=str(tmp_path / "work"))
    with pytest.raises(DataError, match="candidates"):
        BENCHMARK.prepare(nowhere)
    assert BENCHMARK.check_data(nowhere)


@pytest.mark.slow
def test_the_phantom_run_from_another_folder(tmp_path: Path) -> None:
    write_luna16(tmp_path / "in", subsets=(0, 5, 7), scans=1, nodules=2, decoys=4, shape=(50, 56, 56))
    words = [
        f"{key}={tmp_path / place}" for key, place in (("data_root", "in"), ("work_dir", "work"), ("log_dir", "out"))
    ]
    few = ("max_epoch=1", "val_every_epochs=1", "batch_size=4", "bootstrap_rounds=20", "num_gpus=0", "num_threads=1")
    done = start("Luna16", tmp_path, "with", "phantom", *words, *few)
    assert done.code == 0, done.told[-3000:]
    run_dir = Path(done.answer["run_dir"])
    metrics, rows = metrics_of(run_dir), rows_of(run_dir)
    assert metrics["cases"] == {"train": 6, "val": 6, "test": 6} and metrics["protocol"] == "clean"
    assert {"auroc", "ap", "cpm", "froc@0.125", "froc@8", "sensitivity@0.05"} <= set(metrics)
    assert metrics["cpm"]["n"] == 1 and done.answer["cpm"] == pytest.approx(metrics["cpm"]["mean"])
    table = read_csv(run_dir / "results_test.csv", ("Index", "name", "gts", "preds")).rows
    assert [float(row["preds"]) for row in table] == pytest.approx([float(row["prob_nodule"]) for row in rows])
    assert all(0 <= float(row["prob_nodule"]) <= 1 for row in rows) and (run_dir / "report.html").is_file()
