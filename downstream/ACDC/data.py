"""ACDC: right ventricle, myocardium and left ventricle in cine-MRI at end-diastole and end-systole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import AugmentationOptions, Benchmark, Case, SegmentationTask, Splits
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.decathlon import listed_splits
from mg3d.finetuning.scan_checks import check_pairs, missing_names, problem_of, unexpected_files
from mg3d.finetuning.segmentation_keys import SHORT_SEGMENTATION
from mg3d.finetuning.splits import nested_splits, patient_kfold
from mg3d.paths import visible_files
from prepare import LABELS, convert, find_patients, frames

DATASET = "Dataset027_ACDC"
NO_DATA = "set data_root to the unpacked download and run the stage prepare"
IMAGE = re.compile(r"(?P<id>(?P<patient>patient\d+)_frame\d+)_0000\.nii\.gz")

TASK = SegmentationTask(
    classes=tuple(LABELS)[1:],
    label_map={code: code for code in LABELS.values()},
    orientation="RAS",
    roi=(192, 192, 32),
    foreground_crop="raw",
    augmentation=AugmentationOptions(flip_p=0.1),
    crops_per_volume=2,
    loss="dice_ce",
    overlap=0.75,
    tolerances_mm=(2.0,),
)


def task_for(cfg: FinetuneConfig) -> SegmentationTask:
    """The published run crops to what is brighter than the mean; the clean one to what is not zero."""
    return replace(TASK, foreground_crop="reference_zscore") if cfg.protocol == "reference" else TASK


def prepared_folder(cfg: FinetuneConfig) -> Path:
    """The nnU-Net folder: given as ``data_root`` (or inside it), else made from the download below ``work_dir``."""
    root = Path(cfg.data_root)
    given = [place for place in (root, root / DATASET) if (place / "imagesTr").is_dir()]
    return given[0] if given else Path(cfg.work_dir) / DATASET


def prepare(cfg: FinetuneConfig) -> None:
    """Make the nnU-Net folder from the published patient folders, unless one was given.

    Raises:
        DataError: no patient folder below ``data_root``, or a file is missing.
    """
    root, target = Path(cfg.data_root), prepared_folder(cfg)
    if target.is_relative_to(root) and (target / "imagesTr").is_dir():
        return
    if not find_patients(root):
        raise DataError("no patient folder, no imagesTr", NO_DATA, path=str(root))
    convert(root, target)


def read_cases(folder: Path, part: str = "Tr") -> list[Case]:
    """Frames with their label maps, sorted; ED and ES are known from ``cases.json``, else from the order.

    Raises:
        DataError: no frame there.
    """
    found = [
        match for path in visible_files(folder / f"images{part}", "*.nii.gz") if (match := IMAGE.fullmatch(path.name))
    ]
    if not found and part == "Tr":
        raise DataError("no imagesTr/*_0000.nii.gz", NO_DATA, path=str(folder))
    listed = folder / "cases.json"
    known: dict[str, Any] = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    cases, patients = [], set()
    for match in found:
        tags = known.get(match["id"], {"phase": "ES" if match["patient"] in patients else "ED"})
        patients.add(match["patient"])
        files = folder / f"images{part}" / match[0], folder / f"labels{part}" / f"{match['id']}.nii.gz"
        cases.append(Case(match["id"], match["patient"], *files, stratum=tags.get("group", ""), tags=tags))
    return cases


def splits(cfg: FinetuneConfig) -> Splits:
    """Whole patients by disease group; with ``reference_frame_split`` the published lists of frames."""
    folder = prepared_folder(cfg)
    cases = read_cases(folder)
    if cfg.extra["reference_frame_split"]:
        if cfg.protocol != "reference":
            raise ConfigError("reference_frame_split shares patients between the parts", "add protocol=reference")
        path = Path(cfg.extra["reference_frame_split"])
        return listed_splits(path / f"ACDC_fold{cfg.fold}.json" if path.is_dir() else path, cases)
    chosen = nested_splits(patient_kfold(cases, cfg.num_folds, cfg.seed), cfg)
    if not cfg.extra["official_test"]:
        return chosen
    official = tuple(case for case in read_cases(folder, "Ts") if case.label is not None and case.label.is_file())
    if not official:
        raise DataError("no labels of test patients", "leave official_test out", path=str(folder / "labelsTs"))
    return Splits(chosen.train, chosen.val + chosen.test, official, ("reported on the official test patients",))


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download, in the published or the nnU-Net form."""
    patients, lines, cases = find_patients(Path(cfg.data_root)), [], []
    if not patients:
        return _check_nnunet(cfg)
    for patient in patients:
        try:
            pair = frames(patient)
        except DataError as error:
            lines.append(problem_of(error))
            continue
        names = {file.name for case in pair for file in (case.image, case.label) if file}
        names |= {"Info.cfg", "MANDATORY_CITATION.md", f"{patient.name}_4d.nii.gz"}
        lines += unexpected_files(patient, names.__contains__)
        cases += pair
    expected = [f"patient{number:03d}" for number in range(1, cfg.extra["expected_patients"] + 1)]
    lines += missing_names(patients[0].parent, {path.name for path in patients}, expected)
    return lines + check_pairs(cases, TASK.label_map, full=cfg.full_check)


def _check_nnunet(cfg: FinetuneConfig) -> list[str]:
    folder = prepared_folder(cfg)
    try:
        cases = read_cases(folder)
    except DataError as error:
        return [problem_of(error)]
    extra = unexpected_files(folder / "imagesTr", IMAGE.fullmatch)
    return extra + check_pairs(cases, TASK.label_map, full=cfg.full_check)


def write_phantom(root: Path, seed: int) -> None:
    """Draw a small data set."""
    from mg3d.phantoms.downstream.acdc import write_acdc

    write_acdc(root, seed=seed)


BENCHMARK = Benchmark(
    name="ACDC",
    task=TASK,
    task_for=task_for,
    prepare=prepare,
    splits=splits,
    check_data=check_data,
    write_phantom=write_phantom,
    defaults={
        "learning_rate": 3e-4,
        "max_epoch": 300,
        "warmup_epochs": 5.0,
        "precision": 16,
        "val_every_epochs": 10,
        "gradient_checkpointing": True,
    },
    extra_keys={"reference_frame_split": "", "official_test": False, "expected_patients": 100},
    named_configs={"phantom": {**SHORT_SEGMENTATION, "expected_patients": 6, "max_epoch": 6, "val_every_epochs": 3}},
    usage="Cardiac structures in cine-MRI.\n\ndata_root: the download (training/patient001/...), or Dataset027_ACDC.",
)
