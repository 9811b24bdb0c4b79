"""The learning rate of a run whose base rate is meant for a certain number of crops a step. No heavy import.

rate = ``learning_rate`` * (batch_size * crops * processes * accumulate) / ``learning_rate_crops``; the segmentation
benchmarks on CT use 2e-4 at 16 crops (downstream sections 2 and 3), so 1 volume of 4 crops on 2 GPUs gives 1e-4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mg3d.finetuning.benchmark import SegmentationTask, Task

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["describe_learning_rate", "effective_learning_rate"]


def effective_learning_rate(cfg: FinetuneConfig, task: Task, processes: int) -> float:
    """The rate that the optimizer gets.

    Args:
        cfg: config; with ``learning_rate_crops=0`` its ``learning_rate`` is taken as it is.
        task: says how many crops a volume gives in a step; an image of a classification is one.
        processes: processes that share a step (GPUs of all machines).

    Returns:
        the peak rate of the schedule.
    """
    if not cfg.learning_rate_crops:
        return cfg.learning_rate
    return cfg.learning_rate * _crops_a_step(cfg, task, processes) / cfg.learning_rate_crops


def describe_learning_rate(cfg: FinetuneConfig, task: Task, processes: int) -> str:
    """One line that shows how the rate comes about."""
    rate = effective_learning_rate(cfg, task, processes)
    if not cfg.learning_rate_crops:
        return f"learning rate {rate:g}"
    product = (
        f"{cfg.batch_size} volumes x {_crops_a_volume(task)} crops x {processes} processes x {cfg.accumulate} passes"
    )
    return f"learning rate {rate:g} = {cfg.learning_rate:g} x ({product}) / {cfg.learning_rate_crops}"


def _crops_a_step(cfg: FinetuneConfig, task: Task, processes: int) -> int:
    return cfg.batch_size * _crops_a_volume(task) * processes * cfg.accumulate


def _crops_a_volume(task: Task) -> int:
    return task.crops_per_volume if isinstance(task, SegmentationTask) else 1
