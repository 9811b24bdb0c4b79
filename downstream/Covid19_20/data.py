"""COVID-19-20: chest CT and lesion masks side by side in one folder; five contiguous blocks of the sorted names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mg3d.errors import DataError
from mg3d.files import write_csv
from mg3d.finetuning.benchmark import AugmentationOptions, Benchmark, Case, SegmentationTask, Splits
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.scan_checks import check_pairs, problem, problem_of, unexpected_files
from mg3d.finetuning.segmentation_keys import LESIONS_IN_CT, SHORT_SEGMENTATION
from mg3d.finetuning.splits import contiguous_blocks, nested_splits
from mg3d.paths import visible_files

FOLDERS = ("Train", "COVID-19-20_v2/Train", "")
PAIR = re.compile(r"volume-covid19-(?P<id>(?P<patient>A-\d+)(_\d+)?)_(?P<kind>ct|seg)\.nii\.gz")
RESULT_COLUMNS = ("data_path", "target_path", "prediction", "DSC", "NSD", "HD95")

TASK = SegmentationTask(
    classes=("lesion",),
    label_map={0: 0, 1: 1},
    orientation="LPS",
    spacing_mm=(1.25, 1.25, 5.0),
    window=(-1000.0, 500.0),
    roi=(192, 192, 32),
    augmentation=AugmentationOptions(
        flip_p=0.5,
        affine_p=0.15,
        affine_rotate_rad=(0.05, 0.05, 0.0),
        affine_scale=(0.1, 0.1, 0.0),
        noise_p=0.15,
        noise_std=0.01,
    ),
    crops_per_volume=3,
    loss="dice_squared_ce",
    overlap=0.5,
    tolerances_mm=(2.0,),
)


def read_cases(root: Path) -> list[Case]:
    """Pairs of scan and mask below the download, sorted by name.

    Raises:
        DataError: no pair in any of the places where the archive may have been unpacked.
    """
    folder = _folder(root)
    names = [path.name for path in visible_files(folder, "*_ct.nii.gz")]
    found = [match for match in map(PAIR.fullmatch, names) if match]
    if not found:
        what = "no volume-covid19-*_ct.nii.gz here, nor in Train"
        raise DataError(what, "set data_root to the unpacked download", path=str(root))
    return [
        Case(match["id"], match["patient"], folder / match[0], folder / match[0].replace("_ct.", "_seg."))
        for match in found
    ]


def splits(cfg: FinetuneConfig) -> Splits:
    """Fold ``cfg.fold`` of the contiguous blocks is held out."""
    return nested_splits(contiguous_blocks(read_cases(Path(cfg.data_root)), cfg.num_folds), cfg)


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download."""
    try:
        cases = read_cases(Path(cfg.data_root))
    except DataError as error:
        return [problem_of(error)]
    folder, expected = cases[0].image.parent, cfg.extra["expected_cases"]
    masks = {match["id"]: match[0] for path in folder.iterdir() if (match := PAIR.fullmatch(path.name))}
    alone = sorted(masks.keys() - {case.id for case in cases})
    lines = [problem(folder / masks[name], "mask without its scan", "complete the download") for name in alone]
    if expected and len(cases) != expected:
        lines.append(problem(folder, f"{len(cases)} scans, {expected} are published", "complete the download"))
    return lines + unexpected_files(folder, PAIR.fullmatch) + check_pairs(cases, TASK.label_map, full=cfg.full_check)


def write_results(cfg: FinetuneConfig, run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``result.csv`` with the published columns: Dice and surface Dice in percent, HD95 in mm."""
    cases = {case.id: case for case in read_cases(Path(cfg.data_root))}
    table = []
    for row in rows:
        case = cases[row["id"]]
        figures = (100 * row["dice"], 100 * row["nsd@2"], row["hd95"])
        prediction = run_dir / "predictions" / f"{case.id}.nii.gz"
        written = prediction if prediction.is_file() else ""
        table.append([case.image, case.label, written, *(f"{value:.4f}" for value in figures)])
    write_csv(run_dir / "result.csv", RESULT_COLUMNS, table)


def write_phantom(root: Path, seed: int) -> None:
    """Draw a small data set."""
    from mg3d.phantoms.downstream.covid19_20 import write_covid19_20

    write_covid19_20(root, seed=seed)


def _folder(root: Path) -> Path:
    return next((root / place for place in FOLDERS if visible_files(root / place, "*_ct.nii.gz")), root)


BENCHMARK = Benchmark(
    name="Covid19_20",
    task=TASK,
    splits=splits,
    check_data=check_data,
    write_phantom=write_phantom,
    write_results=write_results,
    defaults={**LESIONS_IN_CT, "gradient_checkpointing": True},
    extra_keys={"expected_cases": 199},
    named_configs={"phantom": {**SHORT_SEGMENTATION, "expected_cases": 7}},
    usage="data_root: the folder that holds Train/ (or COVID-19-20_v2/Train/). Published: 199 pairs, five folds.",
)
