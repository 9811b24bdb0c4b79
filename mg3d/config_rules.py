"""Rules that join several config keys; each refusal names the keys, their values and the mend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mg3d.errors import ConfigError

if TYPE_CHECKING:
    from mg3d.config_schema import MG3DConfig

__all__ = ["check_config"]

_TEXT_LOSSES = ("sen_mlm", "local_itc", "itc", "itm", "clm")


def check_config(config: MG3DConfig) -> None:
    """Check the keys against each other.

    Raises:
        ConfigError: two keys contradict each other or a derived size does not fit.
    """
    _check_losses(config)
    _check_geometry(config)
    _check_batches(config)
    _check_schedule(config)
    _check_model(config)


def _check_losses(config: MG3DConfig) -> None:
    for name, weight in config.loss_names.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(
                f"loss_names.{name}={weight!r} is not allowed\n  allowed: a finite number >= 0",
                f"write loss_names.{name}=1",
            )
    if not config.active_losses and not config.test_only:
        raise ConfigError(
            "every weight in loss_names is 0: nothing would be trained", "write for example loss_names.sen_mlm=1"
        )
    textual = [name for name in _TEXT_LOSSES if config.loss_names[name] > 0]
    if config.image_only and textual:
        raise ConfigError(
            f"image_only=True leaves no text for {', '.join(textual)}", f"write loss_names.{textual[0]}=0"
        )
    _check_report_writing(config)
    if config.ssm_negative_threshold > config.ssm_positive_threshold:
        raise ConfigError(
            f"ssm_negative_threshold={config.ssm_negative_threshold:g} exceeds "
            f"ssm_positive_threshold={config.ssm_positive_threshold:g}",
            "keep the negative threshold at or below the positive one (published: 0.6 and 0.9)",
        )


def _check_report_writing(config: MG3DConfig) -> None:
    clm, others = config.loss_names["clm"] > 0, [name for name in config.active_losses if name != "clm"]
    if clm and others:
        raise ConfigError(
            f"loss_names.clm trains alone, but {', '.join(others)} is on", f"write loss_names.{others[0]}=0"
        )
    if clm and not config.vision_only:
        raise ConfigError(
            "loss_names.clm without vision_only=True would let the decoder read the report that it is to write",
            "write vision_only=True",
        )
    if not clm:
        for key in ("vision_only", "freeze_image_encoder", "cache_image_tokens", "clm_standardise"):
            if getattr(config, key):
                given = getattr(config, key)
                raise ConfigError(
                    f"{key}={given} belongs to loss_names.clm, which is 0", f"write {key}={type(given)()}"
                )
        return
    if config.clm_standardise == 1:
        raise ConfigError("clm_standardise=1: one volume has no spread", "write clm_standardise=256")
    if config.cache_image_tokens and not config.freeze_image_encoder:
        raise ConfigError("cache_image_tokens=True needs an encoder that does not learn", "freeze_image_encoder=True")
    if config.cache_image_tokens and config.train_transform_keys != ("clip",):
        raise ConfigError(
            f"cache_image_tokens=True would repeat the first epoch's {config.train_transform_keys[0]}",
            "write train_transform_keys=[clip]",
        )
    for key, needed, why in (
        ("sent_level", False, "would draw one sentence of each fragment and leave the others out"),
        ("fragment_separator", "blank", "would glue words of neighbouring fragments together"),
    ):
        if getattr(config, key) != needed:
            raise ConfigError(
                f"{key}={getattr(config, key)} {why}: loss_names.clm needs whole reports", f"write {key}={needed}"
            )


def _check_geometry(config: MG3DConfig) -> None:
    size = config.volume_size
    if config.loss_names["swin_unetr_mim"] > 0 and any(edge % config.mim_window for edge in size):
        raise ConfigError(
            f"mim_window={config.mim_window} does not divide the volume {list(size)}", "write mim_window=16, 8 or 32"
        )
    if config.loss_names["swin_unetr_mim"] > 0 and config.token_count < 2:
        raise ConfigError(
            f"image_size={list(size)} has one image token: swin_unetr_mim cannot normalise over it",
            "write image_size=[64,32,32] or larger",
        )


def _check_batches(config: MG3DConfig) -> None:
    if not config.datasets:
        raise ConfigError("datasets=[] names no corpus", "write datasets=[clm_ct_rate]")
    if len(set(config.datasets)) != len(config.datasets):
        raise ConfigError(f"datasets={list(config.datasets)} names a corpus twice", "name each corpus once")
    for key in ("train_transform_keys", "val_transform_keys"):
        if len(getattr(config, key)) != 1:
            found = list(getattr(config, key))
            raise ConfigError(f"{key}={found} does not name one image pipeline", f"write {key}=[clip]")
    batch, part = config.batch_size, config.per_gpu_batchsize
    if batch > part and batch % part:
        raise ConfigError(
            f"batch_size={batch} is no multiple of per_gpu_batchsize={part}: it cannot be accumulated",
            f"write batch_size={batch // part * part} or another multiple of {part}",
        )


def _check_schedule(config: MG3DConfig) -> None:
    warmup = config.warmup_steps
    if isinstance(warmup, float) and warmup > 1:
        raise ConfigError(
            f"warmup_steps={warmup!r} is not allowed\n  allowed: an integer (steps) or a fraction between 0 and 1",
            f"write warmup_steps={int(warmup)}",
        )
    if isinstance(config.decay_power, str) and config.decay_power != "cosine":
        raise ConfigError(
            f"decay_power={config.decay_power!r} is not allowed\n  allowed: a number >= 0 or cosine",
            "write decay_power=1",
        )
    interval = config.val_check_interval
    if isinstance(interval, float) and interval > 1:
        raise ConfigError(
            f"val_check_interval={interval!r} is not allowed\n"
            "  allowed: a fraction of an epoch up to 1.0, or an integer count of batches",
            f"write val_check_interval={int(interval)}",
        )


def _check_model(config: MG3DConfig) -> None:
    if config.hidden_size % 8:
        raise ConfigError(
            f"hidden_size={config.hidden_size} is no multiple of 8, the heads of the sentence pooling",
            f"write hidden_size={max(8, round(config.hidden_size / 8) * 8)}",
        )
    if not config.exp_name or "/" in config.exp_name or config.exp_name.startswith("."):
        raise ConfigError(
            f"exp_name={config.exp_name!r} cannot name a folder", "use letters, digits, - and _; places go into log_dir"
        )
    if not config.tokenizer:
        raise ConfigError("tokenizer is empty", "give a hub id or the local directory of a BERT text encoder")
    if config.mlp_ratio != 4 and not config.legacy_unused_modules:
        raise ConfigError(
            f"mlp_ratio={config.mlp_ratio} sizes modules that the model never uses",
            "leave it out, or write legacy_unused_modules=True; encoder sizes are vision_encoder_options",
        )
