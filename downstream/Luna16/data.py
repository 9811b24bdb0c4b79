"""LUNA16: is a candidate a nodule? Cubes of 48 voxels at the scan's own voxel size; the subset decides the split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.errors import ConfigError, DataError
from mg3d.files import write_csv
from mg3d.finetuning.benchmark import Benchmark, Case, ClassificationTask, Splits
from mg3d.finetuning.meta_image_checks import check_meta_image
from mg3d.finetuning.nodule_tables import read_candidates, read_nodules, score_candidates, table_path
from mg3d.finetuning.scan_checks import problem, problem_of
from prepare import EDGE, cubes_folder, find_scans, prepare

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

PARTS = ("train", "val", "test")
PUBLISHED = {"scans": 888, "candidates": 551_065, "nodules": 1_351}


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    """Cube of a candidate, [48, 48, 48] in [0, 1]; 0 is -1000 HU and 1 is 600 HU whatever the scan holds."""
    row = int(case.id.rpartition("_")[2])
    return np.load(case.image, mmap_mode="r", allow_pickle=False)[row].astype(np.float32) / np.float32(255)


def augment(cube: np.ndarray, rng: np.random.Generator, cfg: FinetuneConfig) -> np.ndarray:
    """Flips, quarter turns and rotations (degrees) in the axial plane, shifts by a voxel; for both classes alike."""
    from scipy import ndimage

    for axis in range(3):
        if rng.random() < 0.5:
            cube = np.flip(cube, axis)
    if rng.random() < 0.5:
        cube = np.rot90(cube, int(rng.integers(1, 4)), axes=(1, 2))
    limit = cfg.extra["rotation_degrees"]
    if limit and rng.random() < 0.6:
        cube = ndimage.rotate(cube, rng.uniform(-limit, limit), axes=(1, 2), reshape=False, order=1, mode="nearest")
    if rng.random() < 0.5:
        cube = np.roll(cube, rng.integers(-1, 2, 3), axis=(0, 1, 2))
    return np.ascontiguousarray(cube)


def splits(cfg: FinetuneConfig) -> Splits:
    """Candidates by the number of their subset."""
    subsets = {part: set(cfg.extra[f"{part}_subsets"]) for part in PARTS}
    twice = (subsets["train"] & subsets["val"]) | (subsets["train"] | subsets["val"]) & subsets["test"]
    if twice:
        raise ConfigError(f"subset {min(twice)} is in two parts of the split", "name every subset once")
    folder, root = cubes_folder(cfg), Path(cfg.data_root)
    candidates, scans, parts, absent = read_candidates(root), find_scans(root), {part: [] for part in PARTS}, 0
    for uid, found in candidates.items():
        subset = scans[uid][0] if uid in scans else -1
        image = folder / f"subset{subset}" / f"{uid}.npy"
        if not image.is_file():
            absent += 1
            continue
        for part in PARTS:
            if subset in subsets[part]:
                parts[part] += _cases(uid, image, found.classes)
    if not parts["train"]:
        raise DataError("no prepared scan to train on", "run the stage prepare, or --check-data", path=str(folder))
    notes = [f"{absent} of {len(candidates)} scans have no cubes (absent or unreadable)"] if absent else []
    return Splits(*(tuple(parts[part]) for part in PARTS), tuple(notes))


def _cases(uid: str, image: Path, classes: Iterable[int]) -> list[Case]:
    return [
        Case(f"{uid}_{row:05d}", uid, image, targets=(float(target),), stratum=str(target))
        for row, target in enumerate(classes)
    ]


def froc_entries(
    ids: list[str], probs: np.ndarray, targets: np.ndarray, rounds: int, seed: int, *, root: str
) -> dict[str, dict[str, Any]]:
    """Sensitivity at 1/8 to 8 false positives a scan and the mean of these (CPM), with intervals over scans."""
    return score_candidates(Path(root), ids, probs[:, 0], rounds, seed).entries()


def write_results(cfg: FinetuneConfig, run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """``results_test.csv`` as published."""
    listed = ((index, row["id"], row["target"], row["prob_nodule"]) for index, row in enumerate(rows))
    write_csv(run_dir / "results_test.csv", ("Index", "name", "gts", "preds"), listed)


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download; ``complete=False`` accepts fewer scans than published."""
    root, lines = Path(cfg.data_root), []
    scans = find_scans(root)
    if cfg.extra["complete"]:
        absent = [place for number in range(10) if not (place := root / f"subset{number}").is_dir()]
        lines += [problem(place, "missing", "download and unpack it") for place in absent]
    lines += [line for _, path in scans.values() for line in check_meta_image(path, full=cfg.full_check)]
    try:
        candidates, marked = read_candidates(root), read_nodules(table_path(root, "annotations.csv"))
    except DataError as error:
        return [*lines, problem_of(error)]
    table, annotated = table_path(root, "candidates.csv"), set(marked.scan)
    for uid in sorted((candidates.keys() | annotated) - scans.keys() if cfg.extra["complete"] else ()):
        lines.append(problem(root, f"no subset holds {uid}.mhd", "complete the download"))
    for uid in sorted(scans.keys() - candidates.keys()):
        lines.append(problem(table, f"has no candidate of {uid}", "download the table again"))
    classes = [target for each in candidates.values() for target in each.classes]
    found = {"scans": len(scans), "candidates": len(classes), "nodules": sum(classes)}
    for name, count in PUBLISHED.items() if cfg.extra["complete"] else ():
        if found[name] != count:
            lines.append(problem(table, f"{found[name]} {name}, published are {count}", "or set complete=False"))
    return lines


def write_phantom(root: Path, seed: int) -> None:
    """Ten subsets of two drawn scans."""
    from mg3d.phantoms.downstream.luna16 import write_luna16

    write_luna16(root, nodules=3, decoys=9, seed=seed)


TASK = ClassificationTask(
    outputs=("nodule",), kind="binary", size_dhw=(EDGE,) * 3, load=load, augment=augment, balance="class"
)


def task_for(cfg: FinetuneConfig) -> ClassificationTask:
    """Swin-L reads its projected tokens; the figures know where the tables are."""
    head = "mlp_linear" if cfg.encoder == "swin_l" else TASK.head
    return replace(TASK, head=head, entries=partial(froc_entries, root=cfg.data_root))


BENCHMARK = Benchmark(
    name="Luna16",
    prepare=prepare,
    splits=splits,
    task=TASK,
    task_for=task_for,
    defaults={
        "learning_rate": 1.5e-4,
        "optimizer": "adam",
        "weight_decay": 1e-6,
        "batch_size": 32,
        "max_epoch": 100,
        "val_every_epochs": 5,
    },
    extra_keys={
        "train_subsets": [0, 1, 2, 3, 4],
        "val_subsets": [5, 6],
        "test_subsets": [7, 8, 9],
        "rotation_degrees": 20.0,
        "complete": True,
    },
    check_data=check_data,
    write_results=write_results,
    write_phantom=write_phantom,
    named_configs={
        "phantom": {"complete": False, "batch_size": 10, "max_epoch": 4, "warmup_epochs": 1, "learning_rate": 1e-3},
        "published": {
            "protocol": "reference",
            "axis_order": "xyz",
            "augment": False,
            "schedule": "constant",
            "max_epoch": 10_001,  # nothing stops it earlier, as published
            "val_every_epochs": 10,
        },
    },
    usage="nodule or not, for every candidate of LUNA16: AUROC, and FROC/CPM on the test subsets",
)
