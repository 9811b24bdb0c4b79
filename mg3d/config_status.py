"""Keys and named configs of the published experiment that are not live here, each with the reason and the way out."""

from __future__ import annotations

from typing import Any

__all__ = [
    "DEAD_KEYS",
    "LATER_KEYS",
    "NAMED_NOTICES",
    "NO_EFFECT_KEYS",
    "PLANNED_NAMED_CONFIGS",
    "SYNONYMS",
    "TRANSFORM_HINTS",
    "VALUE_NOTICES",
]

DEAD_KEYS: dict[str, str] = {
    "patch_size_squeeze": "leave it out; the encoder's total stride is patch_size",
    "mim_prob": "write mim_mask_ratio=0.5, the part of the cells that is zeroed",
    "mim_decoder_hidden_size": "leave it out; the volume decoder follows from hidden_size",
    "mim_decoder_num_layers": "leave it out; the volume decoder has five fixed stages",
    "mim_decoder_num_heads": "leave it out; the volume decoder is convolutional",
    "norm_pix_loss": "leave it out; the target is the image in [0,1], cells are sized by mim_window",
    "num_heads": "leave it out; encoder sizes are vision_encoder_options, fusion depth is num_top_layer",
    "num_layers": "leave it out; fusion depth is num_top_layer, the text encoder's depth is its own",
    "mim_layer": "leave it out; the last encoder stage is decoded",
}
"""Keys without any effect in the published code -> what to do instead."""

_TASKS = "the inherited 2-D and text tasks"
LATER_KEYS: dict[str, str] = {
    "draw_false_text": _TASKS,
    "vqa_label_size": _TASKS,
    "mlc_label_size": _TASKS,
    "label_column_name": _TASKS,
    "label_size": _TASKS,
    "get_recall_metric": _TASKS,
    "pseudo_vision_token_pool_size": _TASKS,
    "pseudo_langauge_token_pool_size": _TASKS,
    "num_pseudo_vision_tokens": _TASKS,
    "num_pseudo_langauge_tokens": _TASKS,
    "language_only": _TASKS + " (a CT report is written from its volume: there is no other text)",
}
"""Keys of tasks that are planned for a later round -> the task."""

NO_EFFECT_KEYS: dict[str, tuple[Any, str]] = {
    "vit": (None, "the 3-D model ignores vit; choose its encoder with vision_encoder"),
    "num_heads": (12, ""),  # sizes of the modules of legacy_unused_modules, which are built as published
    "num_layers": (6, ""),
    "pseudo_vision_token_pool_size": (0, ""),
    "pseudo_langauge_token_pool_size": (0, ""),
    "num_pseudo_vision_tokens": (0, ""),
    "num_pseudo_langauge_tokens": (0, ""),
}
"""Keys accepted without effect -> (the only value accepted, None for any; the notice, empty for none)."""

VALUE_NOTICES: dict[tuple[str, Any], str] = {
    ("image_size", 224): "a 2-D setting; volumes keep the published geometry 128 x 96 x 128",
}
"""Published values that stand for something else in three dimensions -> the notice."""

NAMED_NOTICES: dict[str, str] = {
    "clip32": "a 2-D image setting; the 3-D encoder is kept and volumes have the published geometry 128 x 96 x 128",
    "clip_resizedcrop": "crops one box of the whole volume (volume_resizedcrop), not every slice on its own",
}
"""Published named configs that do something else in three dimensions -> the notice."""

SYNONYMS: dict[str, str] = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "max_epoch",
    "max_epochs": "max_epoch",
    "steps": "max_steps",
    "gpus": "num_gpus",
    "nodes": "num_nodes",
    "workers": "num_workers",
    "optimizer": "optim_type",
    "temperature": "cl_temp",
    "encoder": "vision_encoder",
    "losses": "loss_names",
    "resume": "resume_from",
    "checkpoint": "load_path",
    "dataset": "datasets",
    "text_encoder": "tokenizer",
    "out": "log_dir",
    "output_dir": "log_dir",
}
"""Names people try -> the key they mean."""

TRANSFORM_HINTS: dict[str, str] = {
    "clip_resizedcrop": "it crops every slice on its own, which breaks a volume",
    "clip_randaug": "it skips the published crop and augments nothing",
    "imagenet": "it belongs to the 2-D encoders of a later round",
    "imagenet_randaug": "it belongs to the 2-D encoders of a later round",
}
"""Published image pipelines that are refused -> why."""

_TASK_NAMES = (
    "vqa_vqa_rad",
    "vqa_slack",
    "vqa_medvqa_2019",
    "irtr_roco",
    "mlc_chexpert",
    "mlc_pnsa_pneumonia",
    "clm_mimic_cxr_vision_only",
    "clm_mimic_cxr_language_only",
    "clm_mimic_cxr_vision_language",
    "nli_radnli_plus",
    "cls_chemprot",
    "cls_melinda_i_meth",
    "cls_melinda_i_meth_label",
    "cls_melinda_p_meth",
    "cls_melinda_p_meth_label",
)
PLANNED_NAMED_CONFIGS: dict[str, str] = {
    **{f"task_finetune_{name}": "it comes with " + _TASKS for name in _TASK_NAMES},
    "clip16": "a 2-D image setting that comes with " + _TASKS,
    "clip_randaug": "a 2-D image setting that comes with " + _TASKS,
    "imagenet_randaug": "a 2-D image setting that comes with " + _TASKS,
    "swin32_base224": "a 2-D encoder that comes with " + _TASKS,
    "swin32_base384": "a 2-D encoder that comes with " + _TASKS,
    "swin32_large384": "a 2-D encoder that comes with " + _TASKS,
}
"""Published named configs that are refused for now -> why."""
