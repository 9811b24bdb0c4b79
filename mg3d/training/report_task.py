"""The task of writing reports (``loss_names.clm``): its data and module, its first weights, and what is left behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from mg3d.atomic import write_text_atomically
from mg3d.config_schema import MG3DConfig
from mg3d.errors import RunFailedError
from mg3d.models.checkpoint import load_checkpoint
from mg3d.training.console import EVALUATION_TABLE

log = logging.getLogger(__name__)

LAST = "the last weights"


def datamodule(cfg: MG3DConfig) -> pl.LightningDataModule:
    """Volumes with whole reports."""
    from mg3d.datamodules.report_writing import ReportWritingDataModule
    from mg3d.models.language_encoders import create_tokenizer

    return ReportWritingDataModule(cfg, create_tokenizer(cfg.tokenizer))


def module(cfg: MG3DConfig, num_training_steps: int) -> pl.LightningModule:
    """Image side of the pre-trained module with a report head."""
    from mg3d.models.clm import ReportWritingModule
    from mg3d.models.language_encoders import create_tokenizer
    from mg3d.training.trainer import description_of_data

    tokenizer = create_tokenizer(cfg.tokenizer)
    return ReportWritingModule(cfg, tokenizer, num_training_steps, geometry=description_of_data(cfg))


def initialise(cfg: MG3DConfig, made: Any) -> dict[str, Any]:
    """First weights of the module; returns the report for ``weights_report.json``."""
    from mg3d.models.clm.weights import initialise as take_weights

    if not cfg.load_path:
        log.info("load_path is empty: the image encoder starts from random weights")
    return take_weights(made)


def finish(
    cfg: MG3DConfig, trainer: pl.Trainer, made: Any, data: pl.LightningDataModule, run_dir: Path
) -> dict[str, Any]:
    """Write and score the reports of ``eval_split`` with the best weights of the run (all processes take part).

    Leaves ``per_case.csv``, ``generated.json``, ``gallery.html`` and ``evaluation.txt`` in the run folder.

    Returns:
        Entries for ``metrics.json``, with ``notes`` and ``weights``; nothing without ``evaluate``.
    """
    if not cfg.evaluate or cfg.fast_dev_run:
        return {}
    weights = Path(cfg.load_path).name or "random weights"
    if not cfg.test_only:
        weights = _take_best(trainer, made)
        trainer.test(made, datamodule=data, verbose=False)
    if not trainer.is_global_zero:
        return {}
    return _scored(cfg, made, data, run_dir, weights)


def _take_best(trainer: pl.Trainer, made: Any) -> str:
    """Put the weights of the best validation into the module; returns the name of their file."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    best = next((each.best_model_path for each in callbacks if isinstance(each, ModelCheckpoint)), "")
    if not best:
        return LAST
    made.load_state_dict(load_checkpoint(best)["state_dict"])
    return Path(best).name


def _scored(cfg: MG3DConfig, made: Any, data: Any, run_dir: Path, weights: str) -> dict[str, Any]:
    from mg3d.evaluation.finding_reader import finding_reader
    from mg3d.evaluation.reports_beside import label_to_report
    from mg3d.evaluation.written_reports import draw_gallery, render_reports, score_written, write_files

    if not made.case_rows:
        raise RunFailedError(f"no report of the {cfg.eval_split} split could be scored", "check the packed reports")
    entries, notes = score_written(made.case_rows, cfg)
    reader = finding_reader(cfg)
    if reader is not None:
        beside = label_to_report(cfg, made, data, made.case_rows, reader)
        entries, notes = {**entries, **beside.entries}, [*notes, *beside.notes]
    about = f"{len(made.case_rows)} studies of the {cfg.eval_split} split, {weights}"
    if made.unread:
        notes.append(f"{made.unread} studies have no report to compare with and are left out")
    write_files(run_dir, made.case_rows, cfg)
    draw_gallery(run_dir, made.case_rows, cfg, data.dataset(cfg.eval_split))
    write_text_atomically(run_dir / EVALUATION_TABLE, render_reports(entries, notes, about) + "\n")
    return {**entries, "notes": notes, "weights": weights}
