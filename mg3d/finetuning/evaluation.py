"""Scores of a run: its checkpoints or its probe on the reported cases, and the files that hold them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from mg3d.atomic import write_text_atomically
from mg3d.files import csv_text
from mg3d.finetuning.benchmark import Benchmark, ClassificationTask, ReportTask, SegmentationTask, Splits, Task
from mg3d.finetuning.config import FinetuneConfig
from mg3d.finetuning.names import BASELINES
from mg3d.finetuning.scores import score_rows
from mg3d.training.continuation import load_weights_alone
from mg3d.training.run_folder import write_json

log = logging.getLogger(__name__)

__all__ = ["Evaluation", "evaluate_checkpoints", "finish_report", "score_probe", "write_rows"]

PREDICTIONS = "predictions"


@dataclasses.dataclass
class Evaluation:
    """What a run found on the reported cases.

    Attributes:
        rows: rows of the selected state, as in ``per_case.csv``.
        metrics: entries of ``metrics.json``; those of the state after the last step as ``last/<figure>``.
        steps: optimizer step of every scored state.
        selected: which state ``rows`` belong to.
        notes: remarks on the figures.
    """

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    selected: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


def evaluate_checkpoints(
    cfg: FinetuneConfig,
    task: Task,
    trainer: pl.Trainer,
    module: Any,
    datamodule: Any,
    checkpoints: Mapping[str, Path],
    members: Sequence[Any],
    run_dir: Path,
) -> Evaluation:
    """Score states of a model on the test cases; the first one is the selected one.

    Args:
        cfg: the config; without the stages ``evaluate`` and ``predict`` nothing is done.
        task: what is predicted.
        trainer: runs the test loop on all processes.
        module: the model; ends with the weights of the selected state.
        datamodule: its data.
        checkpoints: name -> file, the selected one first; empty scores the weights as they are.
        members: models averaged with it.
        run_dir: receives ``predictions/``.
    """
    found = Evaluation()
    wanted = {"evaluate", "predict"} & set(cfg.stages)
    if not wanted:
        return found
    module.ensemble = list(members)
    states: list[tuple[str, Path | None]] = [*checkpoints.items()] or [("last", None)]
    for name, path in reversed(states):
        step = trainer.global_step if path is None else load_weights_alone(module, path)
        selected = name == states[0][0]
        if not selected and ("evaluate" not in wanted or step == _step_of(checkpoints)):
            continue
        module.prediction_dir = run_dir / PREDICTIONS if selected and cfg.predict and "predict" in wanted else None
        trainer.test(module, datamodule=datamodule, verbose=False)
        entries, notes = score_rows(module.case_rows, task, cfg, getattr(module, "case_arrays", None))
        found.steps[name] = step
        whole = {key: entry for key, entry in entries.items() if "/" not in key and "mean" in entry}
        found.metrics |= entries if selected else {f"{name}/{key}": entry for key, entry in whole.items()}
        if selected:
            found.rows, found.selected, found.notes = list(module.case_rows), name, notes
            if isinstance(task, ReportTask) and trainer.is_global_zero and found.rows:
                _add_baselines(found, cfg, task, module, datamodule, trainer.strategy.root_device)
    return found


def _add_baselines(
    found: Evaluation, cfg: FinetuneConfig, task: ReportTask, module: Any, datamodule: Any, device: Any
) -> None:
    from mg3d.finetuning.report_beside import beside_run
    from mg3d.metrics.clinical import CRG_FLOOR

    beside = beside_run(cfg, task, module, datamodule, found.rows, device)
    found.metrics |= beside.entries
    found.notes += beside.notes
    for name, floor in (("bleu_4", ""), ("ce_f1_micro", ""), ("crg", f" (floor {CRG_FLOOR:.3f})")):
        values = [found.metrics.get(key, {}).get("mean") for key in (name, *(f"{each}/{name}" for each in BASELINES))]
        if all(value is not None for value in values):
            log.info("%s%s: generator %.3f, label-to-report %.3f, best constant report %.3f", name, floor, *values)


def _step_of(checkpoints: Mapping[str, Path]) -> int:
    from mg3d.training.checkpoint_io import read_sidecar

    return int(read_sidecar(next(iter(checkpoints.values())))[1].get("step", -1))


def score_probe(cfg: FinetuneConfig, task: ClassificationTask, module: Any, datamodule: Any) -> Evaluation:
    """Fit the probe that ``cfg.mode`` names on frozen features and score it; on val as ``val/<figure>``."""
    from mg3d.models.finetune.probes import run_probe

    rows = run_probe(module, datamodule, cfg, task)
    found = Evaluation(rows=rows["test"], steps={cfg.mode: 0}, selected=cfg.mode)
    found.metrics, found.notes = score_rows(rows["test"], task, cfg)
    held = score_rows(rows["val"], task, cfg)[0]
    found.metrics |= {f"val/{name}": entry for name, entry in held.items()}
    return found


def finish_report(
    cfg: FinetuneConfig, benchmark: Benchmark, task: Task, splits: Splits, found: Evaluation, run_dir: Path
) -> dict[str, Any]:
    """Write ``per_case.csv``, ``metrics.json``, the benchmark's own tables, pictures and page; rank 0 only.

    Returns:
        the content of ``metrics.json``.
    """
    about: dict[str, Any] = {
        "benchmark": benchmark.name,
        "protocol": cfg.protocol,
        "notes": [*splits.notes, *found.notes, *_left_out(splits, found.rows)],
        "cases": {part: len(getattr(splits, part)) for part in ("train", "val", "test")},
        "selected": found.selected,
        "steps": found.steps,
    }
    if isinstance(task, ReportTask):
        from mg3d.finetuning.report_scores import definitions

        about["definitions"] = definitions(cfg, task)
    metrics = {**about, **dict(sorted(found.metrics.items(), key=lambda item: item[0].count("/")))}
    if found.rows:
        write_rows(run_dir / "per_case.csv", found.rows)
        if benchmark.write_results is not None:
            benchmark.write_results(cfg, run_dir, found.rows)
    write_json(run_dir / "metrics.json", metrics)
    if "report" in cfg.stages and cfg.pictures and found.rows:
        _draw(cfg, task, splits, metrics, found.rows, run_dir)
    return metrics


def _left_out(splits: Splits, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A remark on reported cases without a row: with ``on_bad_sample=skip`` those that could not be read."""
    scored = {row["id"] for row in rows}
    missing = [case.id for case in splits.test if case.id not in scored]
    if not scored or not missing:
        return []
    return [f"{len(missing)} of {len(splits.test)} test cases could not be read and are not scored, {missing[0]} first"]


def _draw(
    cfg: FinetuneConfig,
    task: Task,
    splits: Splits,
    metrics: dict[str, Any],
    rows: list[dict[str, Any]],
    run_dir: Path,
) -> None:
    from mg3d.finetuning.pictures import draw_run_figures, write_report
    from mg3d.finetuning.pictures.run_figures import draw_overlays

    figures = draw_run_figures(run_dir, rows, metrics)
    if isinstance(task, SegmentationTask):
        written = {case.id: run_dir / PREDICTIONS / f"{case.id}.nii.gz" for case in splits.test}
        files = {
            case.id: (case.image, case.label, written[case.id])
            for case in splits.test
            if case.label is not None and written[case.id].is_file()
        }
        figures |= draw_overlays(run_dir, rows, files, task.classes, task.label_map, window=task.window)
    log.info("report %s", write_report(run_dir, metrics, rows, figures))
    if isinstance(task, ReportTask) and cfg.extra.get("gallery"):
        from mg3d.finetuning.report_gallery import write_run_gallery

        log.info("gallery %s", write_run_gallery(cfg, task, splits, rows, run_dir))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, the id first, undefined numbers as empty cells; atomically."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: ("id", "patient", "class").index(name) if name in ("id", "patient", "class") else 3)
    cells = ({name: _cell(value) for name, value in row.items()} for row in rows)
    write_text_atomically(path, csv_text(columns, cells))


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and value != value else value
