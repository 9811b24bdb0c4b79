"""CC-CCII: normal, common pneumonia or COVID-19, from 8-bit slices; the published split tables, or our own folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mg3d.datasets.fitting import centred_start, cut_block
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Benchmark, Case, ClassificationTask, Splits
from mg3d.finetuning.scan_checks import problem, problem_of
from mg3d.finetuning.scan_lists import cases_of_list, check_series, read_scan_list, scan_name, vote_entries
from mg3d.finetuning.splits import patient_kfold
from prepare import CLASSES, LIST, arrays_folder, find_scans, prepare

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

PUBLISHED_SCANS = 4_178  # that the published split tables name
SELECTING_PARTS = 6
BRIGHTNESS, CONTRAST = 7, 5  # per cent


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    """Array of a scan [depth, size, size] in [0, 1]; the crop is cut from its centre unless `augment` moves it."""
    return np.load(case.image, allow_pickle=False).astype(np.float32) / np.float32(255)


def augment(scan: np.ndarray, rng: np.random.Generator, cfg: FinetuneConfig) -> np.ndarray:
    """Left-right flip, brightness, contrast, and a crop up to ``jitter`` pixels off the centre.

    The published code reversed the slices and called it a horizontal flip; ``protocol=reference`` does so too.
    """
    if rng.random() < 0.5:
        scan = np.flip(scan, 0 if cfg.protocol == "reference" else 2)
    if rng.random() < cfg.extra["depth_flip_p"]:
        scan = np.flip(scan, 0)
    scan = scan + rng.integers(-BRIGHTNESS, BRIGHTNESS + 1) / 100
    scan = np.clip(scan * (1 + rng.integers(-CONTRAST, CONTRAST + 1) / 100), 0.0, 1.0)
    size, reach = size_dhw(cfg), cfg.extra["jitter"]
    moved = (0, *rng.integers(-reach, reach + 1, 2))
    starts = [centred_start(n, s) + move for n, s, move in zip(scan.shape, size, moved, strict=True)]
    return cut_block(scan.astype(np.float32), starts, size, 0.0)


def size_dhw(cfg: FinetuneConfig) -> tuple[int, int, int]:
    """What the network sees."""
    crop = cfg.extra["crop"]
    return cfg.roi or (cfg.extra["depth"], crop, crop)


def split_tables(cfg: FinetuneConfig) -> dict[int, dict[str, Path]]:
    """Published tables that are there: fold -> train and valid."""
    places = [Path(cfg.extra["split_dir"])] if cfg.extra["split_dir"] else [Path(cfg.data_root, d) for d in ("", "csv")]
    found = {}
    for place in places:
        for fold in range(cfg.num_folds):
            pair = {part: place / f"CC_CCII_fold{fold}_{part}.csv" for part in ("train", "valid")}
            if all(path.is_file() for path in pair.values()):
                found.setdefault(fold, pair)
    if cfg.extra["split_dir"] and not found:
        raise ConfigError(f"split_dir={cfg.extra['split_dir']} holds no CC_CCII_fold0_train.csv", "leave it out")
    return found


def splits(cfg: FinetuneConfig) -> Splits:
    """The published tables where they are, else patients in seeded folds of equal class shares.

    A sixth of the training patients, in the class shares of all, chooses the epoch.
    """
    folder, tables = arrays_folder(cfg), split_tables(cfg)
    train, held, notes = _published(cfg, tables, folder) if tables else _own(cfg, folder)
    if cfg.protocol == "reference":
        return Splits(train, held, held, (*notes, "selection = reporting"))
    selecting, *rest = patient_kfold(train, SELECTING_PARTS, cfg.seed)
    return Splits(tuple(case for part in rest for case in part), selecting, held, notes)


def _own(cfg: FinetuneConfig, folder: Path) -> tuple[tuple[Case, ...], tuple[Case, ...], tuple[str, ...]]:
    found, _ = cases_of_list(folder / LIST, folder, CLASSES)
    folds = patient_kfold(found, cfg.num_folds, cfg.seed)
    return tuple(case for k, fold in enumerate(folds) if k != cfg.fold for case in fold), folds[cfg.fold], ()


def _published(
    cfg: FinetuneConfig, tables: Mapping[int, Mapping[str, Path]], folder: Path
) -> tuple[tuple[Case, ...], tuple[Case, ...], tuple[str, ...]]:
    if cfg.fold not in tables:
        raise ConfigError(f"fold={cfg.fold}, but there are tables of {sorted(tables)}", "choose one of these")
    (train, lost), (held, missed) = (
        cases_of_list(tables[cfg.fold][part], folder, CLASSES) for part in ("train", "valid")
    )
    common = set.intersection(*(set(read_scan_list(pair["valid"], CLASSES)) for pair in tables.values()))
    notes = [f"{lost + missed} scans of the tables have no array (absent or unreadable)"] if lost + missed else []
    if len(tables) > 1 and common:
        notes.append(f"published tables, no partition: {len(common)} scans are in every valid table")
    return tuple(train), tuple(held), tuple(notes)


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download; ``complete=False`` accepts fewer scans than the published tables name."""
    root, lines = Path(cfg.data_root), []
    try:
        scans = {scan_name(*scan.parts[1:]): scan for scan in find_scans(root)}
        tables = [path for pair in split_tables(cfg).values() for path in pair.values()]
        rows = {name: row for path in tables for name, row in read_scan_list(path, CLASSES).items()}
    except DataError as error:
        return [problem_of(error)]
    if not rows and len(scans) < (PUBLISHED_SCANS if cfg.extra["complete"] else 1):
        what = f"{len(scans)} scans, at least {PUBLISHED_SCANS} are published"
        lines.append(problem(root, what, "complete the download, or set complete=False"))
    return lines + check_series(root, scans, rows, full=cfg.full_check)


def write_phantom(root: Path, seed: int) -> None:
    """Forty drawn scans of thirty patients, as zip files."""
    from mg3d.phantoms.downstream.cc_ccii import write_cc_ccii

    write_cc_ccii(root, seed=seed)


TASK = ClassificationTask(
    outputs=CLASSES, size_dhw=(32, 384, 384), load=load, augment=augment, head="norm_linear", entries=vote_entries
)


def task_for(cfg: FinetuneConfig) -> ClassificationTask:
    """Swin-L pools its decoder's full-resolution map, as published."""
    head = "decoder_gap" if cfg.encoder == "swin_l" and cfg.protocol == "reference" else TASK.head
    return replace(TASK, size_dhw=size_dhw(cfg), head=head)


BENCHMARK = Benchmark(
    name="cc-ccii",
    task=TASK,
    task_for=task_for,
    splits=splits,
    defaults={
        "num_folds": 3,
        "optimizer": "adamw_amsgrad",
        "learning_rate": 3e-4,
        "weight_decay": 1e-5,
        "max_epoch": 130,
        "warmup_epochs": 30,
        "batch_size": 4,
    },
    prepare=prepare,
    check_data=check_data,
    extra_keys={
        "depth": 32,
        "depth_rule": "linear",
        "image_size": 512,
        "crop": 384,
        "jitter": 18,
        "depth_flip_p": 0.0,
        "split_dir": "",
        "complete": True,
    },
    write_phantom=write_phantom,
    named_configs={
        "phantom": {
            "complete": False,
            "depth": 28,
            "image_size": 64,
            "crop": 56,
            "jitter": 3,
            "max_epoch": 5,
            "val_every_epochs": 5,
            "warmup_epochs": 1,
            "learning_rate": 1e-3,
        },
        "published": {"protocol": "reference", "depth": 16, "schedule_interval": "epoch", "weight_decay": 0.01},
    },
    usage="normal, common pneumonia or COVID-19 on CC-CCII: accuracy, macro F1, AUROC, and votes of patients",
)
