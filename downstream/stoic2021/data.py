"""STOIC 2021: is it COVID-19, and will it be severe? The severity is judged among the COVID-positive patients only."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.errors import DataError
from mg3d.files import read_csv, write_csv
from mg3d.finetuning.benchmark import Benchmark, Case, ClassificationTask, Splits
from mg3d.finetuning.meta_image_checks import check_meta_image
from mg3d.finetuning.scan_checks import problem, problem_of, unexpected_files
from mg3d.finetuning.splits import patient_kfold
from mg3d.paths import is_plain_name
from prepare import SCANS, arrays_folder, prepare, settings

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

TABLE = Path("metadata", "reference.csv")
COLUMNS = ("PatientID", "probCOVID", "probSevere")
PUBLISHED_PATIENTS = 2_000
TEST_PARTS = 5  # one of them is the fixed test part


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    """Prepared array of a patient, [D, H, W] in [0, 1]; 0 is -1100 HU and 1 is 300 HU."""
    return np.load(case.image, allow_pickle=False).astype(np.float32)


def augment(scan: np.ndarray, rng: np.random.Generator, cfg: FinetuneConfig) -> np.ndarray:
    """Left-right flip and noise; the published code has an augmentation and leaves it off."""
    if rng.random() < 0.5:
        scan = np.flip(scan, 2)
    noise = rng.uniform(0, cfg.extra["noise"]) * rng.standard_normal(scan.shape, dtype=np.float32)
    return np.clip(scan + noise, 0.0, 1.0).astype(np.float32)


def read_outcomes(root: Path) -> dict[str, tuple[float, float]]:
    """Patient -> COVID positive, severe; each 0 or 1.

    Raises:
        DataError: no table, or a value that is neither 0 nor 1.
    """
    path, known = root / TABLE, {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
    found = {}
    for line, row in read_csv(path, COLUMNS, whole_rows=True).numbered():
        if row["probCOVID"] not in known or row["probSevere"] not in known:
            raise DataError(f"row {line}: outcomes must be 0 or 1", "download the table again", path=str(path))
        if not is_plain_name(row["PatientID"]):
            raise DataError(f"row {line}: PatientID {row['PatientID']!r} is a path", "write its number", path=str(path))
        found[row["PatientID"]] = known[row["probCOVID"]], known[row["probSevere"]]
    return found


def splits(cfg: FinetuneConfig) -> Splits:
    """A fixed test part of a fifth, the same for every fold, and seeded folds of the rest; equal shares of outcomes."""
    folder, outcomes = arrays_folder(cfg), read_outcomes(Path(cfg.data_root))
    cases = [
        Case(patient, patient, folder / f"{patient}.npy", targets=pair, stratum=f"covid{pair[0]:g}_severe{pair[1]:g}")
        for patient, pair in outcomes.items()
        if (folder / f"{patient}.npy").is_file()
    ]
    if not cases:
        raise DataError("no prepared scan", "run the stage prepare, or --check-data", path=str(folder))
    absent = len(outcomes) - len(cases)
    notes = [f"{absent} of {len(outcomes)} patients have no array (absent or unreadable)"] * bool(absent)
    if cfg.protocol == "reference":
        notes.append("the published folds are not shipped: ours are used")
    test, *rest = patient_kfold(cases, TEST_PARTS, cfg.extra["split_seed"])
    folds = patient_kfold([case for part in rest for case in part], cfg.num_folds, cfg.extra["split_seed"])
    train = tuple(case for number, fold in enumerate(folds) for case in fold if number != cfg.fold)
    return Splits(train, folds[cfg.fold], test, tuple(notes))


def entries(ids: list[str], probs: np.ndarray, targets: np.ndarray, rounds: int, seed: int) -> dict[str, Any]:
    """Accuracy and AUROC of COVID-19 over all, and of severity among the COVID positive."""
    from mg3d.metrics.bootstrap import metric_entries
    from mg3d.metrics.patients import weighted_stoic

    return metric_entries(partial(weighted_stoic, probs, targets), ids, rounds, seed)


def write_results(cfg: FinetuneConfig, run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """``result.csv`` as the challenge wants it."""
    write_csv(run_dir / "result.csv", COLUMNS, ([row["id"], row["prob_COVID"], row["prob_Severe"]] for row in rows))


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download; ``complete=False`` accepts fewer patients than published."""
    root = Path(cfg.data_root)
    try:
        outcomes = read_outcomes(root)
    except DataError as error:
        return [problem_of(error)]
    lines = []
    for patient, (covid, severe) in outcomes.items():
        lines += check_meta_image(root / SCANS / f"{patient}.mha", full=cfg.full_check)
        if severe and not covid:
            lines.append(problem(root / TABLE, f"patient {patient} is severe without COVID", "download it again"))
    lines += unexpected_files(root / SCANS, lambda name: name.removesuffix(".mha") in outcomes)
    if cfg.extra["complete"] and len(outcomes) != PUBLISHED_PATIENTS:
        what = f"{len(outcomes)} patients, {PUBLISHED_PATIENTS} are published"
        lines.append(problem(root / TABLE, what, "download it again, or set complete=False"))
    return lines


def write_phantom(root: Path, seed: int) -> None:
    """Sixty drawn patients."""
    from mg3d.phantoms.downstream.stoic2021 import write_stoic2021

    write_stoic2021(root, seed=seed)


TASK = ClassificationTask(
    outputs=("COVID", "Severe"),
    kind="binary",
    size_dhw=(128, 128, 128),
    load=load,
    augment=augment,
    head="norm_linear",
    entries=entries,
    monitor="aucSevere",
)


def task_for(cfg: FinetuneConfig) -> ClassificationTask:
    """Swin-L reads its projected tokens."""
    depth, height, width = settings(cfg)["size"]
    return replace(TASK, size_dhw=(depth, height, width), head="mlp_linear" if cfg.encoder == "swin_l" else TASK.head)


BENCHMARK = Benchmark(
    name="stoic2021",
    task_for=task_for,
    task=TASK,
    write_results=write_results,
    prepare=prepare,
    defaults={
        "num_folds": 3,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "schedule": "constant",
        "max_epoch": 40,
        "batch_size": 2,
    },
    splits=splits,
    extra_keys={"split_seed": 0, "noise": 0.05, "complete": True},
    write_phantom=write_phantom,
    check_data=check_data,
    named_configs={
        "phantom": {"complete": False, "roi": [42, 42, 42], "batch_size": 4, "max_epoch": 12, "learning_rate": 2e-3},
        "published": {"protocol": "reference", "augment": False, "precision": 16},
    },
    usage="COVID-19 and its severity on STOIC 2021: AUROC of severity among the COVID positive, accuracies",
)
