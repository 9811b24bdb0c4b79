"""Named configs: groups of keys under one word of the command line. A later word wins over an earlier one."""

from __future__ import annotations

from typing import Any

from mg3d.config_schema import LOSSES
from mg3d.phantoms.findings import SCORED_FINDINGS

__all__ = ["NAMED_CONFIGS", "objectives"]


def objectives(**weights: float) -> dict[str, float]:
    """Weights of every objective, 0 where none is given: no task inherits another one's objectives."""
    return {name: float(weights.get(name, 0.0)) for name in LOSSES}


_PUBLISHED_PRETRAINING: dict[str, Any] = {
    "exp_name": "task_pretrain_mg3d",
    "seed": 0,
    "datasets": ["clm_chest_ctrg"],
    "loss_names": objectives(sen_mlm=1, swin_unetr_mim=1, local_itc=0.1),
    "batch_size": 4,
    "per_gpu_batchsize": 4,
    "train_transform_keys": ["clip"],
    "val_transform_keys": ["clip"],
    "image_size": 128,
    "patch_size": 32,
    "max_text_len": 250,
    "sent_level": True,
    "learning_rate": 1e-5,
    "warmup_steps": 10000,
    "max_epoch": 60,
    "max_steps": 300000,
}

_TINY: dict[str, Any] = {
    "vision_encoder_size": "tiny",
    "input_image_embed_size": None,
    "input_text_embed_size": None,
    "vocab_size": None,
    "hidden_size": 48,
    "itc_embed_dim": 16,
    "image_size": [64, 32, 64],
    "batch_size": 2,
    "per_gpu_batchsize": 2,
    "max_text_len": 32,
    "max_epoch": None,
    "max_steps": 2,
    "warmup_steps": 0,
    "num_workers": 0,
    "precision": 32,
    "log_every_n_steps": 1,
    "clm_max_text_len": 32,
    "clm_num_beams": 2,
    "evaluate": False,
    "eval_bootstrap": 20,
}


_WRITING: dict[str, Any] = {
    "seed": 0,
    "loss_names": objectives(clm=1),
    "vision_only": True,
    "sent_level": False,
    "train_transform_keys": ["clip"],
    "val_transform_keys": ["clip"],
    "image_size": 128,
    "patch_size": 32,
    "batch_size": 16,
    "per_gpu_batchsize": 4,
    "learning_rate": 5e-6,
    "lr_multiplier_head": 50,
    "lr_multiplier_multi_modal": 5,
    "warmup_steps": 0.1,
    "max_epoch": 50,
    "max_steps": None,
    "evaluate": True,
}


def _writing(corpus: str, name: str) -> dict[str, Any]:
    """Published settings of report writing (spec pretraining 12) for one corpus."""
    return _WRITING | {"exp_name": f"task_finetune_clm_{name}_vision_only", "datasets": [corpus]}


_PHANTOMS: dict[str, Any] = _TINY | {
    "data_root": "data/phantom_arrows",
    "tokenizer": "data/phantom/text_encoder",
    "vision_encoder_size": "published",
    "vision_encoder_options": {"embed_dim": 12, "window_size": 4},
    "patch_merging": "fixed",
    "image_size": [32, 32, 64],
    "hidden_size": 96,
    "max_text_len": 160,
    "train_transform_keys": ["volume_resizedcrop"],
    "batch_size": 16,
    "per_gpu_batchsize": 16,
    "decay_power": "cosine",
    "optim_type": "adamw",
    "weight_decay": 0.05,
    "grad_clip": 5.0,
    "evaluate": True,
    "eval_bootstrap": 400,
}


_SIZE_224: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 32,
    "train_transform_keys": ["clip"],
    "val_transform_keys": ["clip"],
    "input_image_embed_size": 768,
}


def _encoder(name: str, width: int | None = None) -> dict[str, Any]:
    """Choose an encoder; the width that an earlier word gave belongs to another encoder and is replaced."""
    return {"vision_encoder": name, "input_image_embed_size": width}


# (what it does, its keys); the first line is what `print_named_configs` shows.
NAMED_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "task_pretrain_ptunifier": ("published pre-training on CTRG-Chest", _PUBLISHED_PRETRAINING),
    "task_pretrain_mg3d": (
        "published pre-training on both corpora, CT-RATE and CTRG-Chest",
        _PUBLISHED_PRETRAINING | {"datasets": ["clm_ct_rate", "clm_chest_ctrg"]},
    ),
    "task_finetune_clm_ctrg_chest_vision_only": (
        "published report writing on CTRG-Chest",
        _writing("clm_chest_ctrg", "ctrg_chest"),
    ),
    "task_finetune_clm_ct_rate_vision_only": (
        "the same on CT-RATE",
        _writing("clm_ct_rate", "ct_rate"),
    ),
    "vit3d16": (
        "published image settings of size 160",
        {
            "image_size": 160,
            "patch_size": 32,
            "train_transform_keys": ["clip"],
            "val_transform_keys": ["clip"],
            "input_image_embed_size": 768,
        },
    ),
    "vit3d32": (
        "published image settings of size 224, taken as the published volume geometry",
        _SIZE_224,
    ),
    "clip32": (
        "published 2-D image settings of size 224, taken as the published volume geometry",
        _SIZE_224,
    ),
    "clip_resizedcrop": (
        "one random crop of the whole volume in training",
        {"train_transform_keys": ["volume_resizedcrop"], "val_transform_keys": ["clip"]},
    ),
    "text_radbert": (
        "RadBERT text encoder",
        {"tokenizer": "StanfordAIMI/RadBERT", "vocab_size": 28996, "input_text_embed_size": 768},
    ),
    "text_roberta": (
        "RoBERTa base text encoder",
        {"tokenizer": "roberta-base", "vocab_size": 50265, "input_text_embed_size": 768},
    ),
    "text_roberta_large": (
        "RoBERTa large text encoder",
        {"tokenizer": "roberta-large", "vocab_size": 50265, "input_text_embed_size": 1024},
    ),
    "swin_b": ("3-D Swin-B image encoder", _encoder("swin_b")),
    "swin_l": ("3-D Swin-L image encoder", _encoder("swin_l")),
    "unet": ("3-D UNet image encoder (normalises by the batch)", _encoder("unet")),
    "unet_pcrlv2": ("3-D UNet image encoder with ordinary batch norm", _encoder("unet_pcrlv2")),
    "nnunet": ("plain nnU-Net image encoder, weights move to and from nnU-Net v2", _encoder("nnunet", 320)),
    "nnunet_resenc": ("residual nnU-Net image encoder (ResEnc M)", _encoder("nnunet_resenc", 320)),
    "demo": (
        "small run on phantom studies, minutes on two cores, with evaluation",
        _PHANTOMS
        | {
            "exp_name": "demo",
            "itc_embed_dim": 96,
            "mim_window": 8,
            "loss_names": objectives(sen_mlm=1, swin_unetr_mim=1, local_itc=0.1, itc=1),
            "max_steps": 240,
            "warmup_steps": 20,
            # The image encoder learns slower than the heads: its untrained features already tell much, see the README.
            "learning_rate": 5e-4,
            "lr_multiplier_head": 6,
            "lr_multiplier_multi_modal": 6,
            "eval_findings": list(SCORED_FINDINGS),
        },
    ),
    "demo_reports": (
        "small report-writing run on phantom studies, minutes on two cores",
        _writing("clm_ct_rate", "ct_rate")
        | _PHANTOMS
        | {
            "exp_name": "demo_reports",
            "train_transform_keys": ["clip"],
            "freeze_image_encoder": True,
            "cache_image_tokens": True,
            "clm_standardise": 256,
            "max_steps": 1200,
            "warmup_steps": 40,
            "learning_rate": 6e-4,
            "lr_multiplier_head": 5,
            "lr_multiplier_multi_modal": 5,
            "val_check_interval": 1.0,
            "clm_max_text_len": 160,
            "clm_num_beams": 3,
            "clm_findings": "phantom",
        },
    ),
    "tiny": (
        "shrinks any task to seconds a step; name a local text encoder with tokenizer=DIR",
        _TINY | {"patch_merging": "fixed"},
    ),
}
