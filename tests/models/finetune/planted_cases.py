"""Small volumes with and without a planted finding, as ``.npy`` files, and what it takes to train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from scipy.ndimage import gaussian_filter

from mg3d.datamodules.classification import ClassificationDataModule
from mg3d.finetuning.benchmark import Case, ClassificationTask, Splits
from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config
from mg3d.models.finetune.classification import ClassificationModule, build_classification_module

SIZE = (28, 28, 28)  # windows of 7 fill the first grids exactly, which is quick
TINY = {"feature_size": 12, "num_workers": 0, "num_gpus": 0, "batch_size": 4, "weight_decay": 0.0}


def load_planted(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    return np.load(case.image).astype(np.float32) / 255.0


def flip_and_shift(array: np.ndarray, rng: np.random.Generator, cfg: FinetuneConfig) -> np.ndarray:
    flips = [axis for axis in range(3) if rng.random() < 0.5]
    return np.flip(array, flips) + rng.uniform(-0.05, 0.05)


def volume(seed: int, positive: bool, size: tuple[int, ...] = SIZE) -> np.ndarray:
    """Texture of its own brightness, grain and contrast; a dark ball in half of all, a bright one in positive cases."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.standard_normal(size), rng.uniform(1.0, 2.5))
    image = rng.uniform(0.25, 0.45) + rng.uniform(0.03, 0.09) * noise / noise.std()
    places = np.stack(np.indices(size), -1)
    for change in (-0.3 * (rng.random() < 0.5), 0.4 * positive):
        centre = rng.uniform(6, np.asarray(size) - 6)
        image = image + change * (np.linalg.norm(places - centre, axis=-1) <= 5)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def write_cases(folder: Path, count: int, *, first: int = 0, positive_share: float = 0.5) -> tuple[Case, ...]:
    """One case a patient; every first ones positive."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for number in range(first, first + count):
        positive = (number - first) < round(positive_share * count)
        path = folder / f"case_{number:03d}.npy"
        np.save(path, volume(number, positive))
        cases.append(Case(path.stem, f"patient_{number:03d}", path, targets=(float(positive),), stratum=str(positive)))
    return tuple(cases)


def small_splits(folder: Path, train: int = 12, held: int = 6) -> Splits:
    return Splits(
        write_cases(folder, train), write_cases(folder, held, first=500), write_cases(folder, held, first=700)
    )


def task(**changes: Any) -> ClassificationTask:
    keys: dict[str, Any] = {"outputs": ("finding",), "kind": "binary", "size_dhw": SIZE, "load": load_planted}
    return ClassificationTask(**{**keys, **changes})


def config(folder: Path, **keys: Any) -> FinetuneConfig:
    return resolve_finetune_config({**TINY, "work_dir": str(folder / "work"), "data_root": str(folder), **keys})


def build(cfg: FinetuneConfig, what: ClassificationTask, steps: int = 10) -> ClassificationModule:
    pl.seed_everything(cfg.seed, verbose=False)
    return build_classification_module(cfg, what, steps)


def trainer(**keys: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fixed = {"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{**quiet, **fixed, **keys})


def data(cfg: FinetuneConfig, what: ClassificationTask, splits: Splits) -> ClassificationDataModule:
    return ClassificationDataModule(cfg, what, splits)
