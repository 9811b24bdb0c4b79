"""The kinds of task and what belongs to each: data module and module. Imported by name, when a run needs them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mg3d.finetuning.benchmark import (
    ClassificationTask,
    ReportTask,
    SegmentationTask,
    Splits,
    Task,
    VocabularyTask,
)

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["build_datamodule", "build_module"]

_DATA = {
    SegmentationTask: ("mg3d.datamodules.segmentation", "SegmentationDataModule"),
    ClassificationTask: ("mg3d.datamodules.classification", "ClassificationDataModule"),
    ReportTask: ("mg3d.datamodules.report_generation", "ReportDataModule"),
    VocabularyTask: ("mg3d.datamodules.vocabulary", "VocabularyDataModule"),
}
_MODELS = {
    SegmentationTask: ("mg3d.models.finetune.segmentation", "build_segmentation_module"),
    ClassificationTask: ("mg3d.models.finetune.classification", "build_classification_module"),
    ReportTask: ("mg3d.models.finetune.report_generation", "build_report_module"),
    VocabularyTask: ("mg3d.models.finetune.vocabulary_module", "build_vocabulary_module"),
}


def build_datamodule(cfg: FinetuneConfig, task: Task, splits: Splits) -> Any:
    """The Lightning data module of a task (`mg3d.finetuning.benchmark.FinetuneData`)."""
    return _named(_DATA[type(task)])(cfg, task, splits)


def build_module(cfg: FinetuneConfig, task: Task, total_steps: int) -> Any:
    """The Lightning module of a task (`mg3d.finetuning.benchmark.FinetuneModule`), without its weights."""
    return _named(_MODELS[type(task)])(cfg, task, total_steps)


def _named(place: tuple[str, str]) -> Any:
    return getattr(import_module(place[0]), place[1])
