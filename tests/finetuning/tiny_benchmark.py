"""Two tiny benchmarks for the tests: balls to find (classification) and balls to outline (segmentation).

As a program it is the ``main.py`` of the first one: ``python tiny_benchmark.py with phantom``; ``balls_seg`` as the
first word chooses the second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mg3d.finetuning.benchmark import Benchmark, Case, ClassificationTask, SegmentationTask, Splits
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.experiment import run_benchmark
from mg3d.finetuning.splits import nested_splits, patient_kfold

SIZE = (32, 32, 32)
SEG_SIZE = (64, 64, 32)
PATIENTS = 20


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    """Read an array."""
    return np.load(case.image).astype(np.float32)


def augment(array: np.ndarray, generator: np.random.Generator, cfg: FinetuneConfig) -> np.ndarray:
    """Flip or not."""
    return array[:, :, ::-1].copy() if generator.random() < 0.5 else array


def _ball(shape: tuple[int, ...], generator: np.random.Generator, radius: float) -> np.ndarray:
    centre = [generator.uniform(radius + 2, size - radius - 2) for size in shape]
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum((axis - place) ** 2 for axis, place in zip(grid, centre, strict=True)) < radius**2


def write_balls(root: Path, seed: int) -> None:
    """Two noisy volumes a patient; half of the patients have a bright ball."""
    generator = np.random.default_rng(seed)
    targets = {}
    for patient in range(PATIENTS):
        for scan in range(2):
            volume = generator.uniform(0, 0.5, SIZE)
            if patient % 2:
                volume[_ball(SIZE, generator, 8)] += 0.5
            np.save(root / f"p{patient:02d}-{scan}.npy", volume.astype(np.float32))
            targets[f"p{patient:02d}-{scan}"] = patient % 2
    (root / "targets.json").write_text(json.dumps(targets), encoding="utf-8")


def ball_splits(cfg: FinetuneConfig) -> Splits:
    """Folds of whole patients."""
    root = Path(cfg.data_root)
    targets = json.loads((root / "targets.json").read_text(encoding="utf-8"))
    cases = [
        Case(name, name[:3], root / f"{name}.npy", targets=(value,), stratum=str(value), tags={"scan": name[-1]})
        for name, value in targets.items()
    ]
    return nested_splits(patient_kfold(cases, cfg.num_folds, cfg.seed), cfg)


def check_balls(cfg: FinetuneConfig) -> list[str]:
    """Arrays that are not there."""
    root = Path(cfg.data_root)
    if not (root / "targets.json").is_file():
        return [f"{root}/targets.json: missing; download it again"]
    names = json.loads((root / "targets.json").read_text(encoding="utf-8"))
    return [f"{root / name}.npy: missing; download it again" for name in names if not (root / f"{name}.npy").is_file()]


BALLS = Benchmark(
    name="balls",
    task=ClassificationTask(
        outputs=("ball",), kind="binary", size_dhw=SIZE, load="tiny_benchmark:load", augment=augment, head="linear"
    ),
    splits=ball_splits,
    check_data=check_balls,
    write_phantom=write_balls,
    defaults={"learning_rate": 1e-3, "batch_size": 4, "max_epoch": 4, "pictures": False, "num_workers": 0},
    extra_keys={"flavour": "plain", "strength": 1.0},
    named_configs={"phantom": {"max_epoch": 2}, "other": {"learning_rate": 0.5}},
    usage="find balls",
)


def write_outlines(root: Path, seed: int) -> None:
    """One volume a patient with a bright ball and its label map."""
    import nibabel as nib

    generator = np.random.default_rng(seed)
    for patient in range(5):
        ball = _ball(SEG_SIZE, generator, 10)
        volume = generator.uniform(-100, 100, SEG_SIZE) + 200 * ball
        affine = np.diag([1.5, 1.5, 2.0, 1.0])
        nib.save(nib.Nifti1Image(volume.astype(np.int16), affine), root / f"p{patient}.nii.gz")
        nib.save(nib.Nifti1Image(ball.astype(np.uint8), affine), root / f"p{patient}_seg.nii.gz")


def outline_splits(cfg: FinetuneConfig) -> Splits:
    """Folds of whole patients."""
    root = Path(cfg.data_root)
    cases = [Case(f"p{k}", f"p{k}", root / f"p{k}.nii.gz", root / f"p{k}_seg.nii.gz") for k in range(5)]
    return nested_splits(patient_kfold(cases, cfg.num_folds, cfg.seed), cfg)


OUTLINES = Benchmark(
    name="outlines",
    task=SegmentationTask(
        classes=("ball",),
        label_map={0: 0, 1: 1},
        window=(-200, 400),
        roi=(64, 64, 32),
        crops_per_volume=1,
        loss="dice_ce",
        tolerances_mm=(2.0,),
    ),
    splits=outline_splits,
    check_data=lambda cfg: [],
    write_phantom=write_outlines,
    defaults={"learning_rate": 1e-3, "max_epoch": 2, "num_workers": 0, "pictures": False},
    named_configs={"phantom": {"max_epoch": 1}},
)

if __name__ == "__main__":
    words = sys.argv[1:]
    chosen = OUTLINES if words[:1] == ["outlines"] else BALLS
    sys.exit(run_benchmark(chosen, words[1:] if chosen is OUTLINES else words))
