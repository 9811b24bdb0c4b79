"""CT-RATE: 18 findings named by prompts, reports that ask for their volume (spec downstream section 7)."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.datasets.seeding import draw_patients
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Benchmark, Case, ClassificationTask, Splits, VocabularyTask
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.key_ranges import check_vocabulary_keys
from mg3d.finetuning.label_tables import positive_weights
from mg3d.finetuning.pictures.latent_maps import check_maps
from mg3d.finetuning.pools import read_pools
from mg3d.finetuning.scan_checks import unreadable
from mg3d.scans.geometry import Geometry

if TYPE_CHECKING:
    from prepro.readers.base import CaseList
    from prepro.readers.ct_rate import CtRateReader

HUB_ENCODER = "microsoft/BiomedVLP-CXR-BERT-specialized"
SIZE_DHW = (128, 96, 128)
VAL_FRACTION = 0.1
SHOWN = 5
REMOVED = re.compile(r"[\"'()]")
OBJECTIVES = ("vocabulary", "classification")
TASK_KEYS = {"text_pooling": "cls", "image_tokens": "auto", "fusion": "gated", "project": True, "standardise": False}
TASK_KEYS |= {"width": 768, "latent": 768, "max_tokens": 250, "report_loss": 0.0, "text_weights": ""}
LISTS = {"trainable": ["latents", "temperature", "fusion", "projections"], "pools": ["volumes", "studies"]}


def reader(cfg: FinetuneConfig) -> CtRateReader:
    """Reader of the download, on the network's grid."""
    from prepro.readers.ct_rate import CtRateReader

    size = cfg.roi or SIZE_DHW
    return CtRateReader(Path(cfg.data_root), Geometry(size=(size[0], size[1], size[2])), empty_report="keep")


@functools.lru_cache(maxsize=2)
def _listed(root: str) -> CaseList:
    from mg3d.finetuning.config import resolve_finetune_config

    return reader(resolve_finetune_config({"data_root": root})).find_cases()


@functools.lru_cache(maxsize=2)
def _by_id(root: str) -> dict[str, Any]:
    return {case.image_id: case for case in _listed(root).cases}


def load(case: Case, cfg: FinetuneConfig) -> np.ndarray:
    """Read a volume as in pre-training; float32 [D, H, W] in [0, 1]."""
    source = reader(cfg)
    low, high = source.geometry.window_hu
    hu = source.load(_by_id(cfg.data_root)[case.id]).voxels.astype(np.float32)
    return np.clip((hu - low) / (high - low), 0.0, 1.0)


def report_text(findings: str, impression: str, protocol: str) -> str:
    """One text of both sections; published without anything between them."""
    parts = [part for part in (findings, impression) if part]
    return REMOVED.sub("", "".join(parts) if protocol == "reference" else " ".join(parts))


def reports(cfg: FinetuneConfig) -> dict[str, str]:
    """Case id -> report, empty ones left out."""
    texts = {
        case.image_id: report_text(case.findings, case.impression, cfg.protocol)
        for case in _listed(cfg.data_root).cases
    }
    return {name: text for name, text in texts.items() if text.strip()}


def splits(cfg: FinetuneConfig) -> Splits:
    """The official validation split is reported; a tenth of the training patients selects and sets the thresholds.

    With ``protocol=reference`` the reported cases do both, and the first ``max_cases`` of each split are taken.
    """
    texts, notes = reports(cfg), []
    found: dict[str, list[Case]] = {"train": [], "valid": []}
    for each in _listed(cfg.data_root).cases:
        if each.image_id in texts:
            labels = tuple(float(value) for value in each.labels) or (-1.0,) * len(CT_RATE_LABELS)
            case = Case(each.image_id, each.patient_id, each.source[0], targets=labels)
            found[each.origin].append(case)
    if limit := cfg.extra["max_cases"]:
        notes.append(f"at most {limit} volumes of each official split (max_cases)")
        found = {name: _limited(cases, limit, cfg) for name, cases in found.items()}
    train, test = tuple(found["train"]), tuple(found["valid"])
    if cfg.protocol == "reference":
        return Splits(train, test, test, (*notes, "selection = reporting"))
    drawn = draw_patients((case.patient for case in train), VAL_FRACTION, cfg.seed)
    notes.append(f"val: {len(drawn)} patients drawn from the training split with seed {cfg.seed}")
    parts = (tuple(case for case in train if (case.patient in drawn) == wanted) for wanted in (False, True))
    return Splits(*parts, test, tuple(notes))


def _limited(cases: list[Case], limit: int, cfg: FinetuneConfig) -> list[Case]:
    if cfg.protocol == "reference" or len(cases) <= limit:
        return cases[:limit]
    chosen = np.random.default_rng(cfg.seed).permutation(len(cases))[:limit]
    return [cases[row] for row in sorted(chosen)]


def task_for(cfg: FinetuneConfig) -> ClassificationTask:
    """Prompts against volumes, or with ``objective=classification`` a head with weighted positives."""
    objective, size = cfg.extra["objective"], cfg.roi or SIZE_DHW
    check_vocabulary_keys(cfg.extra)
    check_maps(cfg.extra["maps"])
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r}", f"choose one of {', '.join(OBJECTIVES)}")
    shared: dict[str, Any] = {"outputs": CT_RATE_LABELS, "kind": "binary", "load": load, "size_dhw": tuple(size)}
    if objective == "classification":
        labels = np.asarray([case.targets for case in splits(cfg).train])
        return ClassificationTask(**shared, class_weights=positive_weights(labels))
    scored: tuple[str, ...] = ()
    if cfg.phantom:
        from mg3d.phantoms.findings import SCORED_FINDINGS

        scored = SCORED_FINDINGS
    options = {key: cfg.extra[key] for key in TASK_KEYS} | {key: tuple(cfg.extra[key]) for key in LISTS}
    return VocabularyTask(
        **shared,
        **options,
        reports=reports(cfg),
        text_encoder=_text_encoder(cfg),
        templates=tuple(_template(text) for text in cfg.extra["templates"]),
        excluded=read_pools(cfg.extra["pools"], cfg.extra["excluded"]),
        scored=scored,
    )


def _text_encoder(cfg: FinetuneConfig) -> str:
    beside = Path(cfg.data_root) / "text_encoder"
    return cfg.extra["text_encoder"] or (str(beside) if beside.is_dir() else HUB_ENCODER)


def _template(text: str) -> tuple[str, str]:
    present, _, absent = text.partition("|")
    if "{name}" not in present or "{name}" not in absent:
        raise ConfigError(f"templates: {text!r} names no pair of prompts", 'write ["{name}. |not {name}. "]')
    return present, absent


def check_data(cfg: FinetuneConfig) -> list[str]:
    """Every problem of the download, one line each."""
    try:
        check_vocabulary_keys(cfg.extra)
        found = _listed(cfg.data_root)
        texts = reports(cfg)
        read_pools(cfg.extra["pools"], cfg.extra["excluded"])
    except (ConfigError, DataError) as error:
        return [str(error).replace("\n  ", " ")]
    origins = {case.origin for case in found.cases}
    lines = [f"{cfg.data_root}: no {name} volume; mend: download that split" for name in {"train", "valid"} - origins]
    lines += [f"{each.path}: {each.reason}; mend: it is left out" for each in found.exclusions[:SHOWN]]
    if cfg.full_check:
        lines += unreadable(found.cases, reader(cfg).load)
    unlabelled = [case.image_id for case in found.cases if max(case.labels, default=-1) < 0]
    empty = [case.image_id for case in found.cases if case.image_id not in texts]
    for what, names, mend in (("have no labels", unlabelled, "complete the tables"), ("have no report", empty, "none")):
        if names:
            lines.append(f"{cfg.data_root}: {len(names)} volumes {what}: {', '.join(names[:SHOWN])}; mend: {mend}")
    missing = {name: count for name, count in found.notes.items() if name.endswith("without_volume") and count}
    return [*lines, *(f"{cfg.data_root}: {n} {name}; mend: download the volumes" for name, n in missing.items())]


def write_results(cfg: FinetuneConfig, run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The files of the published scripts, and the maps of latents."""
    from mg3d.finetuning.ct_rate_results import write_ct_rate_results

    write_ct_rate_results(cfg, run_dir, rows, CT_RATE_LABELS)


def write_phantom(root: Path, seed: int) -> None:
    """Draw a small data set."""
    from mg3d.phantoms.downstream.ct_rate import write_ct_rate

    write_ct_rate(root, seed=seed)


PHANTOM = {"roi": [32, 32, 32], "cache": "memory", "max_epoch": 10, "val_every_epochs": 2, "batch_size": 16}
PHANTOM |= {"learning_rate": 2e-3, "warmup_epochs": 1.0, "image_tokens": "multi_scale", "standardise": True}
PHANTOM |= {"text_pooling": "mean", "width": 64, "latent": 64, "report_loss": 0.1}
PHANTOM |= {"pools": ["studies", "volumes", "unique_reports"]}
PUBLISHED = {"protocol": "reference", "axis_order": "zxy", "project": False, "max_cases": 1000, "max_epoch": 10}
BENCHMARK = Benchmark(
    name="CT-RATE",
    task=VocabularyTask(outputs=CT_RATE_LABELS, kind="binary", load=load, size_dhw=SIZE_DHW),
    task_for=task_for,
    splits=splits,
    check_data=check_data,
    write_phantom=write_phantom,
    write_results=write_results,
    defaults={"learning_rate": 1e-5, "weight_decay": 0.1, "max_epoch": 10, "warmup_epochs": 1.0, "cache": "memory"},
    extra_keys={
        "objective": "vocabulary",
        "templates": ["{name}. |not {name}. "],
        "text_encoder": "",
        "excluded": "",
        "max_cases": 0,
        "maps": ["tsne"],
        **TASK_KEYS,
        **LISTS,
    },
    named_configs={
        "phantom": PHANTOM,
        "published": PUBLISHED,
        "linear": {"objective": "classification", "mode": "linear_probe"},
        "ensemble": {"templates": ["{name}. |not {name}. ", "There is {name}.|There is no {name}."]},
    },
    usage="18 findings by prompts, and retrieval.\n\ndata_root: the download with dataset/train and dataset/valid.",
)
