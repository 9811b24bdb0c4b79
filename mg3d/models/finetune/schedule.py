"""Learning rates of fine-tuning: warm-up, then half a cosine or a constant (spec downstream 0.6)."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mg3d.models.finetune.layer_decay import parameter_groups

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["build_optimization", "learning_rate_factor", "reference_factor"]


def reference_factor(t: float, warmup: float, total: float) -> float:
    """Factor of the published schedule at its 0-based step ``t``.

    0 at t = 0, t / (W - 1) before W (so that 1 is reached at W - 1), a half cosine from W to M, and again upwards after
    M. A warm-up of one step is one step at rate 0.

    Args:
        t: steps (or epochs) done.
        warmup: W, steps of the warm-up.
        total: M, steps of the run.
    """
    if t < warmup:
        return t / max(1.0, warmup - 1)
    return 0.5 * (1.0 + math.cos(math.pi * (t - warmup) / max(1.0, total - warmup)))


def learning_rate_factor(
    t: float, warmup: float, total: float, schedule: str = "cosine", protocol: str = "clean"
) -> float:
    """Factor of the learning rate at 0-based step ``t``.

    ``clean`` begins above 0: (t + 1) / W during the warm-up, a half cosine from W to M, 0 from M on. ``reference`` is
    `reference_factor`. With ``schedule="constant"`` the factor stays 1 after the warm-up.

    Args:
        t: steps (or epochs) done.
        warmup: W, steps of the warm-up; 0 for none.
        total: M, steps of the run.
        schedule: "cosine" or "constant".
        protocol: "clean" or "reference".

    Returns:
        A factor in [0, 1].
    """
    if schedule == "constant" and t >= warmup:
        return 1.0
    if protocol == "reference":
        return reference_factor(t, warmup, total)
    if t < warmup:
        return min(1.0, (t + 1) / warmup)
    return reference_factor(min(t, total), warmup, total)


def step_factor(step: int, *, total_steps: int, epochs: int, cfg: FinetuneConfig) -> float:
    """Factor at an optimizer step; with ``schedule_interval=epoch`` it changes only between epochs.

    The warm-up is the share ``warmup_epochs / epochs`` of the run, so that it also holds with ``max_steps``.
    """
    if cfg.schedule_interval == "epoch":
        done = step * epochs // total_steps
        return learning_rate_factor(done, cfg.warmup_epochs, epochs, cfg.schedule, cfg.protocol)
    warmup = round(total_steps * min(cfg.warmup_epochs / epochs, 1.0))
    return learning_rate_factor(step, warmup, total_steps, cfg.schedule, cfg.protocol)


def build_optimization(module: nn.Module, encoder: nn.Module, cfg: FinetuneConfig, total_steps: int) -> dict[str, Any]:
    """What a module's ``configure_optimizers`` returns: the optimizer and its schedule, stepped every optimizer step.

    Args:
        module: everything that is trained; parameters without gradient are left out.
        encoder: its image encoder, whose stages get layer-wise rates.
        cfg: the config.
        total_steps: optimizer steps of the run.
    """
    optimizer = build_optimizer(parameter_groups(module, encoder, cfg), cfg)
    factor = partial(step_factor, total_steps=max(total_steps, 1), epochs=cfg.max_epoch or 1, cfg=cfg)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def build_optimizer(groups: list[dict[str, Any]], cfg: FinetuneConfig) -> Optimizer:
    """The optimizer that ``cfg.optimizer`` names, with torch's own betas, over parameter groups."""
    if cfg.optimizer.startswith("adamw"):
        return torch.optim.AdamW(groups, lr=cfg.learning_rate, amsgrad=cfg.optimizer.endswith("amsgrad"))
    if cfg.optimizer == "adam":
        return torch.optim.Adam(groups, lr=cfg.learning_rate)
    return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=0.9)
