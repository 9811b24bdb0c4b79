"""Parameter groups, optimizers and learning-rate schedules (spec pretraining 10)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mg3d.config_schema import MG3DConfig
from mg3d.errors import ConfigError

NO_DECAY_PARTS = (
    "bias",
    *(f"{norm}.{kind}" for norm in ("LayerNorm", "norm", "norm1", "norm2") for kind in ("bias", "weight")),
)
"""Substrings of parameter names without weight decay; ``relative_position_bias_table`` is caught by ``bias``."""

HEAD_PARTS = (
    "mlm_head",
    "mim_head",
    "mim_swin_unter_head",
    "itm_head",
    "itc_head",
    "itc_agg_head",
    "ir_head",
    "vqa_head",
    "cls_head",
    "irtr_head",
    "mlc_head",
    "clm_head",
)
"""Substrings of head names; as published, ``itc_cross_head`` is not among them."""

MULTI_MODAL_PARTS = ("multi_modal", "pseudo")
"""Substrings of the modules between the modalities."""

GROUP_NAMES = (
    "plain",
    "plain_no_decay",
    "head",
    "head_no_decay",
    "multi_modal",
    "multi_modal_no_decay",
)
"""Names of the six parameter groups, by index."""


def parameter_group_index(name: str) -> int:
    """Group of a parameter by substrings of its full name.

    Args:
        name: dotted parameter name.

    Returns:
        0 plain, 2 head, 4 multi-modal; plus 1 without weight decay. A name that is both counts as a head.
    """
    base = 2 if _has(name, HEAD_PARTS) else 4 if _has(name, MULTI_MODAL_PARTS) else 0
    return base + int(_has(name, NO_DECAY_PARTS))


def build_parameter_groups(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    lr_multiplier_head: float = 5.0,
    lr_multiplier_multi_modal: float = 5.0,
    include_frozen: bool = False,
) -> list[dict[str, Any]]:
    """Sort the parameters of a module into the six published groups.

    Args:
        module: the network.
        learning_rate: base rate; heads and multi-modal modules get it times their multiplier.
        weight_decay: decay of the even groups; the odd groups get 0.
        lr_multiplier_head: rate multiplier of the heads.
        lr_multiplier_multi_modal: rate multiplier of the multi-modal modules.
        include_frozen: keep parameters without gradient, as the published code does.

    Returns:
        Six groups with ``params``, ``lr``, ``weight_decay`` and ``name``; some may be empty.
    """
    rates = [learning_rate * factor for factor in (1.0, lr_multiplier_head, lr_multiplier_multi_modal)]
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": rates[index // 2], "weight_decay": 0.0 if index % 2 else weight_decay, "name": name}
        for index, name in enumerate(GROUP_NAMES)
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or include_frozen:
            groups[parameter_group_index(name)]["params"].append(parameter)
    return groups


def build_optimizer(groups: list[dict[str, Any]], optim_type: str, learning_rate: float) -> Optimizer:
    """Build the optimizer over parameter groups.

    Args:
        groups: from :func:`build_parameter_groups`.
        optim_type: ``adam`` (betas 0.9/0.999, coupled L2), ``adamw`` (betas 0.9/0.98) or ``sgd`` (momentum 0.9).
        learning_rate: default rate of groups that set none.

    Raises:
        ValueError: unknown type, or no parameter to train.
    """
    if not any(group["params"] for group in groups):
        raise ValueError("no parameter requires a gradient: nothing to train")
    if optim_type == "adam":
        return torch.optim.Adam(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)
    if optim_type == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8)
    if optim_type == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    raise ValueError(f"optim_type must be adam, adamw or sgd, got {optim_type!r}")


def schedule_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_power: float | str = 1.0,
    base_lr: float = 1.0,
    end_lr: float = 0.0,
) -> float:
    """Learning-rate factor after ``step`` scheduler steps: linear warm-up from 0, then polynomial or cosine decay.

    The first optimizer step uses factor(0), which is 0 with warm-up. ``end_lr`` is compared with ``base_lr`` only, so
    groups with a multiplier end at multiplier times ``end_lr`` (as published).

    Args:
        step: number of scheduler steps taken, from 0.
        total_steps: step at which the end is reached; the factor stays there afterwards.
        warmup_steps: steps of the warm-up.
        decay_power: exponent of the polynomial, or ``"cosine"``.
        base_lr: learning rate that belongs to factor 1.
        end_lr: learning rate at the end.

    Returns:
        Factor in [0, 1] for ``end_lr <= base_lr``.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    floor = end_lr / base_lr if end_lr else 0.0
    if step >= total_steps:
        return floor
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    remaining = (
        0.5 * (1.0 + math.cos(math.pi * progress))
        if _is_cosine(decay_power)
        else (1.0 - progress) ** float(decay_power)
    )
    return floor + (1.0 - floor) * remaining


def resolve_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Number of warm-up steps: an integer as it is, a float as a fraction of ``total_steps`` (rounded down).

    Raises:
        ValueError: negative, or a fraction above 1.
    """
    if warmup_steps < 0 or (isinstance(warmup_steps, float) and warmup_steps > 1):
        raise ValueError(f"warmup_steps must be an integer >= 0 or a fraction in [0, 1], got {warmup_steps!r}")
    return int(total_steps * warmup_steps) if isinstance(warmup_steps, float) else int(warmup_steps)


def total_optimizer_steps(batches_per_epoch: int, max_epochs: int, accumulate: int = 1) -> int:
    """Optimizer steps of a run, counted by ourselves: ``ceil(batches / accumulate) * epochs``.

    Raises:
        ValueError: a count below 1.
    """
    if min(batches_per_epoch, max_epochs, accumulate) < 1:
        raise ValueError(f"need at least one batch and epoch, got {batches_per_epoch=}, {max_epochs=}, {accumulate=}")
    return math.ceil(batches_per_epoch / accumulate) * max_epochs


def build_optimizer_and_scheduler(
    module: nn.Module,
    *,
    total_steps: int,
    learning_rate: float,
    weight_decay: float = 1e-8,
    optim_type: str = "adam",
    lr_multiplier_head: float = 5.0,
    lr_multiplier_multi_modal: float = 5.0,
    warmup_steps: float = 0,
    decay_power: float | str = 1.0,
    end_lr: float = 0.0,
    include_frozen: bool = False,
) -> tuple[Optimizer, LambdaLR]:
    """Optimizer over the six groups and its schedule, stepped once per optimizer step.

    Args:
        module: the network.
        total_steps: optimizer steps of the run (:func:`total_optimizer_steps` or ``max_steps``).
        learning_rate: base rate.
        weight_decay: decay of the even groups.
        optim_type: ``adam``, ``adamw`` or ``sgd``.
        lr_multiplier_head: rate multiplier of the heads.
        lr_multiplier_multi_modal: rate multiplier of the multi-modal modules.
        warmup_steps: steps, or a float fraction of ``total_steps``.
        decay_power: polynomial exponent or ``"cosine"``.
        end_lr: final base rate.
        include_frozen: keep parameters without gradient in the optimizer.

    Raises:
        ValueError: an argument out of range.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if isinstance(decay_power, str) and not _is_cosine(decay_power):
        raise ValueError(f"decay_power must be a number or 'cosine', got {decay_power!r}")
    groups = build_parameter_groups(
        module,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        lr_multiplier_head=lr_multiplier_head,
        lr_multiplier_multi_modal=lr_multiplier_multi_modal,
        include_frozen=include_frozen,
    )
    optimizer = build_optimizer(groups, optim_type, learning_rate)
    factor = partial(
        schedule_factor,
        total_steps=total_steps,
        warmup_steps=resolve_warmup_steps(warmup_steps, total_steps),
        decay_power=decay_power,
        base_lr=learning_rate,
        end_lr=end_lr,
    )
    return optimizer, LambdaLR(optimizer, factor)


def configured_optimization(module: nn.Module, cfg: MG3DConfig, total_steps: int | None) -> OptimizerLRScheduler:
    """Optimizer and schedule of a config, as Lightning takes them: the schedule moves with every optimizer step.

    Args:
        module: its parameters are put into the six groups.
        cfg: learning rate and its factors, decay, warm-up and schedule.
        total_steps: optimizer steps of the run.

    Raises:
        ConfigError: the number of steps is not known.
    """
    if not total_steps:
        raise ConfigError("the number of training steps is unknown", "set max_steps, or pass num_training_steps")
    optimizer, scheduler = build_optimizer_and_scheduler(
        module,
        total_steps=total_steps,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        optim_type=cfg.optim_type,
        lr_multiplier_head=cfg.lr_multiplier_head,
        lr_multiplier_multi_modal=cfg.lr_multiplier_multi_modal,
        warmup_steps=cfg.warmup_steps,
        decay_power=cfg.decay_power,
        end_lr=cfg.end_lr,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _has(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def _is_cosine(decay_power: float | str) -> bool:
    return decay_power == "cosine"
