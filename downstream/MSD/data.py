"""Medical Segmentation Decathlon, task 6 (lung) and task 10 (colon): tumours in CT; contiguous folds of the names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import AugmentationOptions, Benchmark, Case, SegmentationTask, Splits
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.decathlon import read_listing
from mg3d.finetuning.scan_checks import check_pairs, check_scan, missing_names, problem, problem_of, unexpected_files
from mg3d.finetuning.segmentation_keys import LESIONS_IN_CT, SHORT_SEGMENTATION
from mg3d.finetuning.splits import contiguous_blocks, nested_splits
from mg3d.paths import visible_files

FOLDERS = {"lung": "Task06_Lung", "colon": "Task10_Colon"}
LUNG = SegmentationTask(
    classes=("cancer",),
    label_map={0: 0, 1: 1},
    orientation="RAS",
    spacing_mm=(1.5, 1.5, 1.5),
    window=(-175.0, 250.0),
    roi=(96, 96, 96),
    foreground_crop="raw",
    augmentation=AugmentationOptions(
        flip_p=0.5,
        rot90_p=0.3,
        affine_p=1.0,
        affine_rotate_rad=(0.0, 0.0, 0.20943951),  # pi / 15 about the third axis
        affine_scale=(0.1, 0.1, 0.1),
        zoom_p=0.3,
        zoom_range=(1.3, 1.5),
        intensity_scale_p=0.1,
        intensity_scale=0.1,
        intensity_shift_p=0.1,
        intensity_shift=0.1,
    ),
    crops_per_volume=4,
    positive=2.0,
    loss="dice",
    overlap=0.5,
    tolerances_mm=(2.0, 4.0),
)
COLON = replace(
    LUNG,
    spacing_mm=(1.0, 1.0, 1.0),
    window=(-57.0, 175.0),
    augmentation=replace(LUNG.augmentation, rot90_p=0.25, intensity_scale_p=0.5, intensity_shift_p=0.0),
    positive=1.0,
    loss="dice_squared_ce",
)


def task_for(cfg: FinetuneConfig) -> SegmentationTask:
    """Lung or colon; the published lung run meant twice as many crops on tumour, but made as many of both."""
    organ = _organ(cfg)
    if organ == "lung" and cfg.protocol == "reference":
        return replace(LUNG, positive=1.0)
    return LUNG if organ == "lung" else COLON


def task_folder(cfg: FinetuneConfig) -> Path:
    """Folder of the task: below ``data_root``, or ``data_root`` itself."""
    root = Path(cfg.data_root)
    return root if (root / "labelsTr").is_dir() else root / FOLDERS[_organ(cfg)]


def read_cases(cfg: FinetuneConfig) -> list[Case]:
    """Training images with their label maps, sorted by name.

    Raises:
        DataError: no training image where the archive should have been unpacked.
    """
    folder, organ = task_folder(cfg), _organ(cfg)
    images = visible_files(folder / "imagesTr", f"{organ}_*.nii.gz")
    if not images:
        raise DataError(f"no imagesTr/{organ}_*.nii.gz", f"set data_root to where {folder.name} lies", path=str(folder))
    names = [path.name.removesuffix(".nii.gz") for path in images]
    labels = [folder / "labelsTr" / path.name for path in images]
    return [Case(*each) for each in zip(names, names, images, labels, strict=True)]


def splits(cfg: FinetuneConfig) -> Splits:
    """Fold ``cfg.fold`` of the contiguous blocks is held out."""
    return nested_splits(contiguous_blocks(read_cases(cfg), cfg.num_folds), cfg)


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download of one task."""
    folder = task_folder(cfg)
    try:
        cases, listing = read_cases(cfg), read_listing(folder / "dataset.json")
    except DataError as error:
        return [problem_of(error)]
    images, labels = ({pair[place] for pair in listing.training} for place in (0, 1))
    parts = {"imagesTr": images, "labelsTr": labels, "imagesTs": set(listing.test)}
    lines = []
    if listing.announced not in (None, len(listing.training)):
        what = f"numTraining is {listing.announced}, but {len(listing.training)} pairs are listed"
        lines.append(problem(folder / "dataset.json", what, "download it again"))
    for part, names in parts.items():
        lines += missing_names(folder / part, {path.name for path in (folder / part).glob("*")}, sorted(names))
        lines += unexpected_files(folder / part, names.__contains__)
    for path in visible_files(folder / "imagesTs", "*.nii.gz"):
        lines += check_scan(path, full=cfg.full_check)
    paired = [case for case in cases if case.label is not None and case.label.is_file()]
    return lines + check_pairs(paired, LUNG.label_map, full=cfg.full_check)


def write_phantom(root: Path, seed: int) -> None:
    """Draw both tasks, small."""
    from mg3d.phantoms.downstream.msd import write_msd

    write_msd(root, seed=seed)


def _organ(cfg: FinetuneConfig) -> str:
    organ = cfg.extra["organ"]
    if organ not in FOLDERS:
        raise ConfigError(f"organ={organ!r} is not allowed\n  allowed: {', '.join(FOLDERS)}", "write organ=lung")
    return str(organ)


BENCHMARK = Benchmark(
    name="MSD",
    task=LUNG,
    task_for=task_for,
    splits=splits,
    check_data=check_data,
    write_phantom=write_phantom,
    defaults=LESIONS_IN_CT,
    extra_keys={"organ": "lung"},
    named_configs={
        "phantom": dict(SHORT_SEGMENTATION),
        "lung": {"organ": "lung"},
        "colon": {"organ": "colon"},
    },
    usage="Tumours of lung (Task06) and colon (Task10) in CT.\n\ndata_root: the folder that holds Task06_Lung/ and "
    "Task10_Colon/, or one of them; organ=lung or organ=colon chooses.",
)
