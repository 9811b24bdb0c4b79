"""Which parts of a fine-tuned model learn, and how fast: freezing and layer-wise learning rates."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from mg3d.models.optimization import NO_DECAY_PARTS
from mg3d.models.vision_encoders.unet import STAGE_NAMES

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["encoder_stage", "freeze_encoder", "parameter_groups"]

LAST_STAGE = 5
"""Depth of what follows all stages (a projection head); no encoder has more stages."""

_NUMBERED = (re.compile(r"layers(\d+)c?\."), re.compile(r"encoder\.stages\.(\d+)\."))


def encoder_stage(name: str) -> int:
    """Depth of an encoder's parameter, from its name: 0 for what sees the voxels, one more a stage.

    Args:
        name: dotted name inside the encoder (Swin, UNet or nnU-Net).
    """
    if name.startswith(("patch_embed.", "encoder.stem.")):
        return 0
    for pattern in _NUMBERED:
        match = pattern.match(name)
        if match:
            return int(match[1])
    stage = name.split(".")[0]
    return STAGE_NAMES.index(stage) if stage in STAGE_NAMES else LAST_STAGE


def frozen_stages(cfg: FinetuneConfig) -> int:
    """How many stages of the encoder stay as loaded; a probe freezes all."""
    if cfg.mode != "full" or cfg.freeze == "encoder":
        return LAST_STAGE + 1
    return int(cfg.freeze.removeprefix("stages_")) if cfg.freeze.startswith("stages_") else 0


def freeze_encoder(encoder: nn.Module, cfg: FinetuneConfig) -> int:
    """Stop the gradient of the stages that ``freeze`` and ``mode`` name, and put them into evaluation mode.

    Args:
        encoder: the image encoder.
        cfg: reads ``freeze`` ("none", "encoder", "stages_N": the first N) and ``mode`` (a probe freezes everything).

    Returns:
        Number of frozen parameters.
    """
    limit = frozen_stages(cfg)
    frozen = 0
    for name, parameter in encoder.named_parameters():
        if encoder_stage(name) < limit:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    for part in encoder.modules():
        own = list(part.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            part.eval()  # Lightning keeps the mode, so running statistics stay as well
    return frozen


def parameter_groups(module: nn.Module, encoder: nn.Module, cfg: FinetuneConfig) -> list[dict[str, Any]]:
    """Parameters with gradient by learning rate and weight decay.

    A stage k of the encoder has the base rate times ``layer_decay ** (last + 1 - k)``; heads and decoders have the base
    rate. With ``protocol=clean`` biases and norms have no weight decay; published runs decay everything.

    Args:
        module: everything that is trained.
        encoder: its image encoder.
        cfg: the config.

    Returns:
        Groups for an optimizer, named ``stage<k>`` or ``head``, with ``_no_decay`` where it applies.

    Raises:
        ValueError: nothing has a gradient.
    """
    depth = {id(parameter): encoder_stage(name) for name, parameter in encoder.named_parameters()}
    last = max(depth.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        stage = depth.get(id(parameter))
        rate = cfg.learning_rate * (1.0 if stage is None else cfg.layer_decay ** (last + 1 - stage))
        plain = cfg.protocol == "clean" and _without_decay(name, parameter)
        kind = ("head" if stage is None else f"stage{stage}") + ("_no_decay" if plain else "")
        group = {"params": [], "lr": rate, "weight_decay": 0.0 if plain else cfg.weight_decay, "name": kind}
        groups.setdefault(kind, group)["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter requires a gradient: nothing to train")
    return [groups[kind] for kind in sorted(groups)]


def _without_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1 or any(part in name for part in NO_DECAY_PARTS)
