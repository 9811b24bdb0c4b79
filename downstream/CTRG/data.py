"""CTRG-Chest: a report for every chest CT (spec downstream section 8)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d.atomic import write_text_atomically
from mg3d.datasets.keyword_labels import findings_by_keywords
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.datasets.report_vocabulary import MAX_TOKENS, MIN_COUNT, ReportVocabulary, clean_published
from mg3d.datasets.seeding import draw_patients
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning import ctrg_download
from mg3d.finetuning.benchmark import Benchmark, Case, ReportTask, Splits
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.ctrg_download import image_problems, name_of
from mg3d.finetuning.key_ranges import check_report_keys
from mg3d.paths import confined_path

if TYPE_CHECKING:
    import numpy as np

ANNOTATIONS = ("annotation.json", "chest_ctrg_nitfy_ori_split.json")
LABEL_TABLE = "CTRG_finding_labels.csv"
VAL_FRACTION = 0.10
SHOWN = 5
TASK_KEYS = {"width": 512, "max_tokens": MAX_TOKENS, "beams": 3, "min_words": 0, "length_penalty": 0.0}
TASK_KEYS |= {"block_trigrams": False, "label_loss": 0.1, "ranking_loss": 0.1, "text_memory": 0.0, "patch_dropout": 0.0}
TASK_KEYS |= {"dropout": 0.1, "place_scale": 0.0}


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    """Read a scan as in pre-training; float32 [D, H, W] in [0, 1]."""
    from mg3d.scans.ctrg import read_ctrg

    return read_ctrg(case.image, cfg.roi or TASK.size_dhw)


def annotation_path(cfg: FinetuneConfig) -> Path:
    """The file that lists scans and reports.

    Raises:
        DataError: there is none.
    """
    root = Path(cfg.data_root)
    names = [cfg.extra["annotation"]] if cfg.extra["annotation"] else ANNOTATIONS
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(f"no {' or '.join(names)}", "set data_root to the download, or annotation=FILE", path=str(root))


def read_annotation(cfg: FinetuneConfig) -> dict[str, list[dict[str, Any]]]:
    """Entries of the three lists, each with id, report and image_path."""
    lists = ctrg_download.read_annotation(annotation_path(cfg))
    for entry in (entry for part in lists.values() for entry in part):
        _image_of(entry, Path(cfg.data_root))
    return lists


def read_labels(cfg: FinetuneConfig) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Names of the labels, and case id -> 0 or 1 each: 1 where the table says present (code 1).

    CTRG's own table has CheXbert's 14 columns; any other labeller's may take its place.

    Raises:
        DataError: no such table, or one that cannot be used.
    """
    path = Path(cfg.data_root) / cfg.extra["labels"]
    if not path.is_file():
        raise DataError("no table of labels for the losses", "or: label_loss=0 ranking_loss=0", path=str(path))
    return ctrg_download.read_finding_codes(path)


def _image_of(entry: dict[str, Any], root: Path) -> Path:
    """The NIfTI file, or the folder of the slices."""
    listed = entry["image_path"]
    return confined_path(root, listed) if isinstance(listed, str) else confined_path(root, listed[0]).parent


def _cases(entries: list[dict[str, Any]], cfg: FinetuneConfig, labels: dict[str, tuple[float, ...]]) -> list[Case]:
    root, found = Path(cfg.data_root), {}
    for entry in entries:
        if clean_published(entry["report"]):
            name = name_of(entry["id"])
            found[name] = Case(name, name, _image_of(entry, root), targets=labels.get(name, ()))
    return list(found.values())


def splits(cfg: FinetuneConfig) -> Splits:
    """The annotation's test list is reported; a tenth of its train list selects, drawn as for pre-training.

    With ``protocol=reference`` the published lists count, whose val and test are the same studies (D60).
    """
    lists, (_, labels) = read_annotation(cfg), _used_labels(cfg)
    train, val, test = (_cases(lists[part], cfg, labels) for part in ("train", "val", "test"))
    if cfg.protocol == "reference":
        return Splits(tuple(train), tuple(val), tuple(test), ("selection = reporting",))
    held_out = {case.id for case in test}
    kept = [case for case in train if case.id not in held_out]
    drawn = draw_patients((case.id for case in kept), VAL_FRACTION, cfg.seed)
    notes = [f"val: {len(drawn)} cases drawn from the train list with seed {cfg.seed}"]
    if len(kept) < len(train):
        notes.append(f"{len(train) - len(kept)} train cases left out, they are also test cases")
    parts = ([case for case in kept if (case.id in drawn) == wanted] for wanted in (False, True))
    return Splits(*(tuple(part) for part in parts), tuple(test), tuple(notes))


def _used_labels(cfg: FinetuneConfig) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Labels where a loss learns them."""
    return read_labels(cfg) if cfg.extra["label_loss"] or cfg.extra["ranking_loss"] else ((), {})


def task_for(cfg: FinetuneConfig) -> ReportTask:
    """Reports, and the vocabulary of the training ones."""
    check_report_keys(cfg.extra)
    chosen = splits(cfg)
    reports = {name_of(entry["id"]): entry["report"] for rows in read_annotation(cfg).values() for entry in rows}
    vocabulary = ReportVocabulary.build((reports[case.id] for case in chosen.train), cfg.extra["min_count"])
    if chosen.train and vocabulary.size < 2:
        raise ConfigError(f"min_count={cfg.extra['min_count']} leaves no word", "write min_count=3 or fewer")
    options = {key: cfg.extra[key] for key in TASK_KEYS}
    if cfg.protocol == "reference":
        options["text_memory"] = 1.0
    task = replace(TASK, reports=reports, vocabulary=vocabulary, labels=_used_labels(cfg)[0], **options)
    if not cfg.phantom:
        return replace(task, findings=findings_by_keywords, finding_names=CT_RATE_LABELS)
    from mg3d.phantoms.findings import FINDINGS
    from mg3d.phantoms.report import stated_findings

    return replace(task, findings=stated_findings, finding_names=FINDINGS)


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download, one line each."""
    check_report_keys(cfg.extra)
    lines: list[str] = []
    try:
        lists = read_annotation(cfg)
        labels, chosen = _used_labels(cfg)[1], splits(cfg)
    except DataError as error:
        return [str(error).replace("\n  ", " ")]
    root, entries = Path(cfg.data_root), {name_of(row["id"]): row for rows in lists.values() for row in rows}
    places = {name: _image_of(entry, root) for name, entry in entries.items()}
    empty = [name for name, entry in entries.items() if not clean_published(entry["report"])]
    unlabelled = [name for name in entries if name not in labels] if labels else []
    bare = [part for part in ("train", "val", "test") if not getattr(chosen, part)]
    for what, names, mend in (
        *((what, names, "download them again") for what, names in image_problems(places.values(), full=cfg.full_check)),
        ("reports are empty", empty, "they are left out"),
        ("parts of the split have no case", bare, "complete the lists of the annotation"),
        ("cases have no labels", unlabelled, f"complete {cfg.extra['labels']}"),
    ):
        if names:
            more = " ..." if len(names) > SHOWN else ""
            lines.append(f"{root}: {len(names)} {what}: {', '.join(names[:SHOWN])}{more}; mend: {mend}")
    return lines


def write_results(cfg: FinetuneConfig, run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of the published code: ``generated.json`` with filename, prediction, ground_truth."""
    column = "reference" if cfg.protocol == "clean" else "reference_published"
    table = [{"filename": row["id"], "prediction": row["hypothesis"], "ground_truth": row[column]} for row in rows]
    write_text_atomically(run_dir / "generated.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def write_phantom(root: Path, seed: int) -> None:
    """Draw a small data set."""
    from mg3d.phantoms.downstream.ctrg import write_ctrg

    write_ctrg(root, seed=seed)


TASK = ReportTask(reports={}, load=load)
BENCHMARK = Benchmark(
    name="CTRG",
    task=TASK,
    task_for=task_for,
    splits=splits,
    check_data=check_data,
    write_phantom=write_phantom,
    write_results=write_results,
    defaults={
        "learning_rate": 1e-4,
        "weight_decay": 5e-5,
        "optimizer": "adamw_amsgrad",
        "max_epoch": 30,
        "batch_size": 2,
        "seed": 456789,
        "grad_clip": 5.0,
    },
    extra_keys={
        "annotation": "",
        "labels": LABEL_TABLE,
        "min_count": MIN_COUNT,
        "meteor": "auto",
        "gallery": 12,
        **TASK_KEYS,
    },
    named_configs={
        "phantom": {
            "labels": "planted_findings.csv",
            "roi": [32, 32, 32],
            "freeze": "encoder",
            "cache": "memory",
            "max_epoch": 32,
            "val_every_epochs": 32,  # only at the end: BLEU-4 of a few cases prefers half-trained weights
            "batch_size": 16,
            "learning_rate": 5e-3,
            "weight_decay": 1.0,
            "dropout": 0.0,
            "place_scale": 2.0,
            "width": 96,
            "label_loss": 2.0,
            "ranking_loss": 0.0,
            "patch_dropout": 0.8,
            "length_penalty": 1.0,
        },
        "frozen": {"freeze": "encoder", "cache": "memory"},
        "words_only_reference": {"protocol": "reference", "label_loss": 0.0, "ranking_loss": 0.0},
    },
    usage="Reports of chest CT.\n\ndata_root: slices or NIfTI volumes with the annotation JSON and the finding table.",
)
