"""How many batches make an optimizer step, how many steps a run, and where in an epoch it is validated."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from mg3d.errors import ConfigError
from mg3d.training.settings import TrainingConfig

__all__ = ["accumulation", "training_steps", "validation_interval"]

log = logging.getLogger(__name__)


def accumulation(cfg: TrainingConfig, world_size: int) -> int:
    """Micro-batches per optimizer step: ``batch_size // (per_gpu_batchsize * world_size)``, at least 1."""
    return max(cfg.batch_size // (cfg.per_gpu_batchsize * world_size), 1)


def training_steps(cfg: TrainingConfig, batches_per_epoch: Callable[[int], int], world_size: int) -> int:
    """Optimizer steps of the whole run, for the schedule.

    ``max_steps`` when given; else ``ceil(batches / accumulation) * max_epoch``, as the trainer also steps on the rest
    of an epoch. Never through the trainer's own estimate, which would drop the loader's state on resume.

    Args:
        cfg: the config.
        batches_per_epoch: world size -> batches of one process in a training epoch.
        world_size: processes of the run.

    Raises:
        ConfigError: neither ``max_steps`` nor ``max_epoch`` is given.
    """
    if cfg.max_steps is not None:
        return cfg.max_steps
    if cfg.max_epoch is None:
        raise ConfigError("neither max_steps nor max_epoch is given", "set one of them, e.g. max_epoch=60")
    return math.ceil(batches_per_epoch(world_size) / accumulation(cfg, world_size)) * cfg.max_epoch


def validation_interval(cfg: TrainingConfig, batches: int, world_size: int) -> int | float:
    """``val_check_interval``, moved to the end of an optimizer step: gradients in the making are in no checkpoint.

    Args:
        cfg: the config.
        batches: of one process in a training epoch.
        world_size: processes of the run.

    Raises:
        ConfigError: more batches than an epoch has.
    """
    given, every = cfg.val_check_interval, accumulation(cfg, world_size)
    if isinstance(given, int) and given > batches and not cfg.fast_dev_run:
        raise ConfigError(
            f"val_check_interval={given}, but a process has {batches} batches in an epoch",
            f"give val_check_interval={batches} or less, or 1.0 for the end of the epoch",
        )
    wanted = given if isinstance(given, int) else max(1, int(batches * given))
    moved = min(-(-wanted // every) * every, batches)
    if moved == wanted or cfg.fast_dev_run:
        return given
    log.warning("val_check_interval=%s: validating every %d batches, at the end of an optimizer step", given, moved)
    return moved
