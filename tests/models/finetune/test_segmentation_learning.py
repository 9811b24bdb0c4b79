"""Segmentation learns: one phantom case, and real CT with real label maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
from segmentation_cases import AFFINES, task, write_case

from mg3d.datamodules.segmentation import SegmentationDataModule
from mg3d.finetuning.benchmark import AugmentationOptions, Case, SegmentationTask, Splits
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.models.finetune.segmentation import SegmentationModule, build_segmentation_module

# TotalSegmentator's numbers: liver, five lung lobes, vertebrae; the rest is background here.
ABDOMEN = {raw: 0 for raw in range(118)} | {5: 1} | dict.fromkeys(range(10, 15), 2) | dict.fromkeys(range(26, 51), 3)
READERS = dict.fromkeys(range(1, 5), 1)
REAL: dict[str, dict[str, Any]] = {
    "lidc_0314_chest_2mm": {
        "label": "lidc_0314_chest_2mm_nodule_readers",
        "classes": ("nodule",),
        "label_map": READERS,
        "window": (-1000.0, 500.0),
        "loss": "dice",
        "positive": 3.0,
    },
    "totalseg_abdomen_ct_3mm": {
        "label": "totalseg_abdomen_seg117",
        "classes": ("liver", "lungs", "vertebrae"),
        "label_map": ABDOMEN,
        "window": (-175.0, 250.0),
        "spacing_mm": (4.0, 4.0, 4.0),
    },
}


class Trained(NamedTuple):
    before: float
    after: float
    losses: list[float]


def trained(tmp_path: Path, case: Case, options: SegmentationTask, steps: int) -> Trained:
    """Mean Dice of one case before and after some steps on it, and the losses; its prediction is written."""
    pl.seed_everything(0, verbose=False)
    cfg = resolve_finetune_config(
        {
            "feature_size": 12,
            "num_workers": 0,
            "num_gpus": 0,
            "cache": "memory",
            "max_steps": steps,
            "learning_rate": 1e-2,
            "schedule": "constant",
        }
    )
    data = SegmentationDataModule(cfg, options, Splits((case,), (case,), (case,)))
    module = build_segmentation_module(cfg, options, steps)
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    running = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=[Losses()],
        default_root_dir=tmp_path,
    )
    running.test(module, datamodule=data, verbose=False)
    before = mean_dice(module)
    running.fit(module, datamodule=data)
    module.prediction_dir = tmp_path / "predictions"
    running.test(module, datamodule=data, verbose=False)
    return Trained(before, mean_dice(module), losses)


def mean_dice(module: SegmentationModule) -> float:
    return float(np.mean([row["dice"] for row in module.case_rows]))


@pytest.mark.slow
def test_one_case_is_learned_by_heart(tmp_path: Path) -> None:
    case = write_case(tmp_path, shape=(64, 64, 32))
    options = task(roi=(64, 64, 32), crops_per_volume=1, augmentation=AugmentationOptions())
    found = trained(tmp_path, case, options, steps=30)
    print(f"Dice {found.before:.3f} -> {found.after:.3f}, loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f}")
    assert found.after > 0.9
    assert np.mean(found.losses[-5:]) < np.mean(found.losses[:5])


def around_the_label(folder: Path, files: tuple[Path, Path], size: tuple[int, ...] = (64, 48, 32)) -> Case:
    """The part of a scan that holds its label map, at its place in space."""
    middle = np.argwhere(np.asarray(nib.load(files[1]).dataobj)).mean(axis=0).astype(int)
    box = tuple(slice(centre - edge // 2, centre + edge - edge // 2) for centre, edge in zip(middle, size, strict=True))
    for file in files:
        nib.save(nib.load(file).slicer[box], folder / file.name)
    return Case("part", "p", *(folder / file.name for file in files))


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_ct_is_learned_and_predicted_in_place(tmp_path: Path, shared_dir: Path, name: str) -> None:
    settings = dict(REAL[name])
    scans = shared_dir / "data" / "ct"
    files = scans / f"{name}.nii.gz", scans / f"{settings.pop('label')}.nii.gz"
    case = around_the_label(tmp_path, files) if name.startswith("lidc") else Case(name, "p", *files)
    options = task(roi=(64, 32, 32), crops_per_volume=2, overlap=0.25, foreground_crop="raw", **settings)
    check_learned_in_place(tmp_path, case, options)


@pytest.mark.slow
def test_an_oblique_case_is_learned_and_predicted_in_place(tmp_path: Path) -> None:
    case = write_case(tmp_path, affine=AFFINES["oblique"], shape=(64, 48, 24))
    options = task(roi=(64, 32, 32), crops_per_volume=2, overlap=0.25, foreground_crop="raw")
    check_learned_in_place(tmp_path, case, options)


def check_learned_in_place(tmp_path: Path, case: Case, options: SegmentationTask) -> None:
    """Some steps raise the Dice of a case, and the prediction lies on its grid."""
    found = trained(tmp_path, case, options, steps=20)
    print(
        f"{case.id}: Dice {found.before:.3f} -> {found.after:.3f}, loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f}"
    )
    assert found.after > found.before + 0.05
    image, written = nib.load(case.image), nib.load(tmp_path / "predictions" / f"{case.id}.nii.gz")
    assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
    assert set(np.unique(np.asarray(written.dataobj))) <= set(range(len(options.classes) + 1))
