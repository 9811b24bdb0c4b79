"""Rules between the keys of a fine-tuning config. No heavy import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mg3d.errors import ConfigError

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["check_finetune_config"]


def check_finetune_config(cfg: FinetuneConfig) -> None:
    """Refuse keys that contradict each other.

    Raises:
        ConfigError: naming the keys and the mend.
    """
    _check_folds(cfg)
    _check_model(cfg)
    if cfg.max_epoch is None and cfg.max_steps is None:
        raise ConfigError("neither max_epoch nor max_steps is given", "set one of them, e.g. max_epoch=100")
    if not cfg.stages:
        raise ConfigError("stages=[]: there is nothing to do", "write stages=train,evaluate")
    if cfg.roi is not None and len(cfg.roi) != 3:
        raise ConfigError(f"roi={list(cfg.roi)}: three sizes are needed", "write roi=[96,96,96]")


def _check_folds(cfg: FinetuneConfig) -> None:
    if cfg.fold >= cfg.num_folds:
        raise ConfigError(
            f"fold={cfg.fold}, but num_folds={cfg.num_folds}\n  allowed: 0 to {cfg.num_folds - 1}",
            f"write fold={cfg.num_folds - 1} or fewer, or more num_folds",
        )


def _check_model(cfg: FinetuneConfig) -> None:
    if cfg.freeze.startswith("stages_") and not cfg.freeze[len("stages_") :].isdigit():
        raise ConfigError(f"freeze={cfg.freeze!r} names no number of stages", "write freeze=stages_2")
    if cfg.mode != "full" and cfg.layer_decay != 1.0:
        raise ConfigError(
            f"layer_decay={cfg.layer_decay} with mode={cfg.mode}: the encoder is frozen", "leave layer_decay out"
        )
    if cfg.feature_size % 12 and cfg.encoder.startswith("swin"):
        raise ConfigError(f"feature_size={cfg.feature_size}: not a multiple of 12", "write feature_size=12, 48 or 96")
    if cfg.encoder == "nnunet" and cfg.decoder == "swin_unetr":
        raise ConfigError(f"decoder={cfg.decoder} needs a Swin encoder, not {cfg.encoder}", "write decoder=auto")
