"""The typed config: every live key with its meaning, type, range and default, and the one function that builds it.

Key names are those of the published experiment, with new ones beside them in their section. No heavy import.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d.config_geometry import resolve_volume_size
from mg3d.config_rules import check_config
from mg3d.config_status import TRANSFORM_HINTS
from mg3d.config_types import check_value, describe, plain, setting, suggest
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import ConfigError

__all__ = [
    "DATASETS",
    "LATER_LOSSES",
    "LOSSES",
    "PLACES",
    "MG3DConfig",
    "config_defaults",
    "key_table",
    "resolve_config",
]

LOSSES = ("sen_mlm", "swin_unetr_mim", "local_itc", "itc", "itm", "clm")
LATER_LOSSES = ("mlm", "mim", "umlm", "umim", "vqa", "cls", "mlc", "irtr")
DATASETS = ("clm_chest_ctrg", "clm_ct_rate", "clm_own", "clm_own_*")
VISION_ENCODERS = ("swin_b", "swin_l", "unet", "unet_pcrlv2", "nnunet", "nnunet_resenc")
PRECISIONS = (16, 32, "bf16")
PUBLISHED_WEIGHTS = {"sen_mlm": 1.0, "swin_unetr_mim": 1.0, "local_itc": 0.1, "itc": 0.0, "itm": 0.0, "clm": 0.0}
_TINY_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
TINY_ENCODERS: dict[str, dict[str, Any]] = {
    "swin_b": _TINY_SWIN,
    "swin_l": _TINY_SWIN | {"proj_hidden_dim": 48, "proj_out_dim": 48},
    "unet": {"base_width": 4},
    "unet_pcrlv2": {"base_width": 4},
    "nnunet": {"features_per_stage": [4, 8, 16, 32, 40, 40]},
    "nnunet_resenc": {"features_per_stage": [4, 8, 16, 32, 40, 40], "blocks_per_stage": 1},
}


@dataclasses.dataclass(frozen=True)
class MG3DConfig:
    """One checked configuration; build it with `resolve_config`. Lists are tuples; `to_dict` gives plain JSON."""

    # Run
    exp_name: str = setting("ptunifier", "first part of the run folder's name")
    seed: int = setting(0, "seeds python, numpy, torch, sampling and masking", low=0, high=2**32 - 1)
    log_dir: str = setting("result", "folder that receives one folder a run", path=True)
    default_root_dir: str = setting(
        "checkpoints", "folder of Lightning's own files when a run has no log_dir", path=True
    )
    test_only: bool = setting(False, "skip training, run the test split")
    fast_dev_run: bool | int = setting(False, "True: one batch of each phase; an integer: that many", low=0)
    log_every_n_steps: int = setting(10, "optimizer steps between two log lines", low=1)
    deterministic: bool = setting(True, "ask torch for deterministic algorithms (warn where none exists)")
    num_threads: int = setting(0, "CPU threads of torch a process; 0 leaves torch's choice", low=0, high=1024)

    # Data
    datasets: tuple[str, ...] = setting(["clm_chest_ctrg"], "corpora to concatenate", choices=DATASETS)
    data_root: str = setting("data/pretrain_arrows", "folder of the packed .arrow files", path=True)
    image_root: str = setting(
        "", "folder of the volumes that published path-only rows name; empty: data_root", path=True
    )
    data_frac: float = setting(1.0, "fraction of the training rows that is used (seeded choice)", above=0, high=1)
    batch_size: int = setting(
        4, "studies an optimizer step; accumulation = batch_size // (per_gpu x gpus x nodes)", low=1
    )
    per_gpu_batchsize: int = setting(4, "studies a forward pass of one process", low=1)
    num_workers: int = setting(8, "loader processes a rank", low=0, high=256)
    train_transform_keys: tuple[str, ...] = setting(
        ["clip"], "image pipeline of training", choices=["clip", "volume_resizedcrop"]
    )
    val_transform_keys: tuple[str, ...] = setting(
        ["clip"], "image pipeline of validation and test", choices=["clip", "volume_resizedcrop"]
    )
    image_size: int | tuple[int, ...] = setting(128, "published switch 96, 128, 160, 192; or [D,H,W] voxels", high=1024)
    draw_false_image: int = setting(0, "extra negative volumes a study; 1 when itm is on", low=0, high=16)
    image_only: bool = setting(False, "leave every text out")
    on_bad_sample: str = setting("raise", "what an unreadable row does", choices=["raise", "skip"])
    max_bad_fraction: float = setting(
        0.01, "with on_bad_sample=skip: largest tolerated fraction of bad rows", low=0, high=1
    )
    fixed_draws: bool = setting(False, "repeat the first epoch's masks, crops and sentences in every epoch")
    verify_crc: bool = setting(True, "compare each row with its stored checksum on reading")

    # Text
    tokenizer: str = setting("StanfordAIMI/RadBERT", "hub id or local directory of the text encoder and its tokenizer")
    vocab_size: int | None = setting(28996, "checked against the tokenizer; None: the tokenizer's", low=5)
    max_text_len: int = setting(250, "tokens after padding or truncation", low=4, high=512)
    sent_level: bool = setting(False, "build the report from its fragments and index them")
    fragment_separator: str = setting(
        "blank", "joins fragments; none_reference is the published index drift", choices=["blank", "none_reference"]
    )
    whole_word_masking: bool = setting(True, "mask whole words rather than word pieces")
    mlm_prob: float = setting(0.15, "fraction of text tokens chosen for masking", above=0, high=1)
    wwm_budget: str = setting(
        "padded_reference",
        "length that the masking budget is taken of: padded (published) or real",
        choices=["padded_reference", "real"],
    )

    # Model
    vision_encoder: str = setting("swin_b", "3-D image encoder", choices=VISION_ENCODERS)
    vision_encoder_options: dict[str, Any] = setting({}, "encoder sizes, e.g. embed_dim, depths")  # noqa: RUF009 - a field
    vision_encoder_size: str = setting(
        "published", "sizes that vision_encoder_options start from; tiny is for trials", choices=["published", "tiny"]
    )
    patch_merging: str = setting(
        "legacy", "octant order of Swin's merging: legacy (released weights) or fixed", choices=["legacy", "fixed"]
    )
    patch_size: int = setting(32, "total stride of the encoder in voxels; checked against it", choices=[32])
    gradient_checkpointing: bool = setting(False, "recompute encoder blocks in the backward pass to save memory")
    input_image_embed_size: int | None = setting(
        None, "token width of the image encoder, checked; None: the encoder's", low=1
    )
    input_text_embed_size: int | None = setting(
        None, "token width of the text encoder, checked; None: the encoder's", low=1
    )
    hidden_size: int = setting(768, "width of the fusion space", low=8, high=8192)
    num_top_layer: int = setting(2, "cross-attention layers of the fusion", low=1, high=24)
    fusion_variant: str = setting("mean", "form of the cross attentions", choices=["mean", "unet", "ctrate"])
    drop_rate: float = setting(0.1, "dropout of the text encoder when it is not in eval mode", low=0, below=1)
    freeze_text_encoder: bool = setting(True, "keep the text encoder's weights and leave them out of the optimizer")
    text_encoder_eval: bool = setting(True, "no dropout in the text encoder; False is the published behaviour")
    text_encoder_random_init: bool = setting(
        False, "build the text encoder from its config file alone, without weights"
    )
    legacy_unused_modules: bool = setting(False, "build the modules that the published model builds and never uses")
    mlp_ratio: int = setting(4, "MLP width over hidden_size in the unused modules; with legacy_unused_modules", low=1)
    load_path: str = setting("", "initial weights (checkpoint, safetensors, export folder); empty: none", path=True)
    load_partial: bool = setting(False, "accept a load_path that covers under 95 % of the image encoder")

    # Objectives
    loss_names: dict[str, float] = setting(PUBLISHED_WEIGHTS, "objective -> weight; 0: off")  # noqa: RUF009 - a field
    mim_mask_ratio: float = setting(
        0.5, "fraction of the volume's cells that masked image modelling zeroes", above=0, below=1
    )
    mim_window: int = setting(16, "edge of one masking cell in voxels", low=1)
    mim_mask_mode: str = setting(
        "sample", "one mask a study, or one a batch as published", choices=["sample", "batch_reference"]
    )
    mim_fusion: str = setting(
        "mlm_cross", "fusion of the masked-image branch (mlm_cross as published)", choices=["mlm_cross", "mim_cross"]
    )
    sal_weight: float = setting(0.1, "weight of sentence alignment inside sen_mlm", low=0)
    sal_detach_target: bool = setting(False, "no gradient into the sentence-alignment target")
    image_feature_reuse: str = setting(
        "encoder",
        "image features of local_itc; projected_reference projects them twice",
        choices=["encoder", "projected_reference"],
    )
    itc_detach_sentences: bool = setting(True, "no gradient from local_itc into the text projection, as published")
    cl_temp: float = setting(0.1, "temperature of the contrastive terms", above=0)
    ssm_positive_threshold: float = setting(0.9, "cosine from which two sentences say the same", low=-1, high=1)
    ssm_negative_threshold: float = setting(0.6, "cosine up to which two sentences differ", low=-1, high=1)
    contrastive_gather: str = setting(
        "global",
        "features compared across processes: exact, none, or the published gradient",
        choices=["global", "local", "published_reference"],
    )
    itc_embed_dim: int = setting(256, "width of the shared image-text space of itc", low=1, high=8192)
    itc_text_source: str = setting(
        "report", "text feature of itc: the report's tokens, or each sentence alone", choices=["report", "sentence"]
    )
    same_report_pairs: str = setting(
        "keep",
        "studies of a batch that share one report: negatives of each other as published, or masked and counted",
        choices=["keep", "mask"],
    )
    memory_queue: str = setting("none", "negatives kept from earlier steps", choices=["none", "moco", "xbm"])
    memory_queue_size: int = setting(32, "entries of the queue", low=1)

    # Writing reports (loss_names.clm)
    vision_only: bool = setting(False, "write reports from the image alone; what loss_names.clm needs")
    freeze_image_encoder: bool = setting(False, "keep the image encoder's weights while reports are learned")
    cache_image_tokens: bool = setting(
        False, "keep the tokens of a frozen image encoder in memory: each volume is encoded once a process"
    )
    clm_standardise: int = setting(
        0,
        "training volumes that give each image token's mean and spread before the first step; 0: none, as published",
        low=0,
    )
    clm_max_text_len: int = setting(256, "tokens of a written report, start and end included", low=4, high=512)
    clm_num_beams: int = setting(5, "beams of the search that writes reports; 1: greedy", low=1, high=64)
    clm_do_sample: bool = setting(True, "also write a report word by word at random, scored apart as sampled/...")
    clm_empty_report: str = setting(
        "keep",
        "an empty written report scores 0; sentence_reference puts the published sentence there",
        choices=["keep", "sentence_reference"],
    )
    clm_findings: str = setting(
        "keywords",
        "reader of findings in written reports: of CT-RATE's 18 by keywords, of phantoms, or none",
        choices=["keywords", "phantom", "none"],
    )
    clm_meteor: str = setting(
        "auto",
        "METEOR of written reports: the Java program, NLTK's, the first that works (auto), or none",
        choices=["auto", "java", "nltk", "none"],
    )

    # Optimisation
    optim_type: str = setting("adam", "optimizer", choices=["adam", "adamw", "sgd"])
    learning_rate: float = setting(2e-5, "base rate", low=0)
    weight_decay: float = setting(1e-8, "coupled L2 (decoupled with adamw)", low=0)
    decay_power: float | str = setting(1.0, "power of the polynomial decay, or cosine", low=0)
    end_lr: float = setting(0.0, "base rate at the last step", low=0)
    warmup_steps: int | float = setting(10000, "integer: steps; fraction between 0 and 1: of all steps", low=0)
    lr_multiplier_head: float = setting(5.0, "rate multiplier of the heads", low=0)
    lr_multiplier_multi_modal: float = setting(5.0, "rate multiplier of the multi-modal modules", low=0)
    max_epoch: int | None = setting(None, "epochs; ignored when max_steps is given", low=1)
    max_steps: int | None = setting(None, "optimizer steps", low=1)
    grad_clip: float = setting(0.0, "largest gradient norm; 0 does not clip", low=0)
    max_bad_steps: int = setting(0, "steps with a non-finite loss that may be skipped before the run stops", low=0)

    # Hardware and Trainer
    num_gpus: int | None = setting(None, "accelerators a node; 0: CPU; None: what is there", low=0, high=1024)
    devices: tuple[int, ...] | None = setting(None, "device indices; None: the first num_gpus", low=0)
    num_nodes: int = setting(1, "machines", low=1)
    precision: int | str = setting(16, "16, 32 or bf16; 16 on a CPU falls back to 32 with a notice", choices=PRECISIONS)
    val_check_interval: int | float = setting(1.0, "fraction of an epoch, or an integer count of batches", above=0)
    resume_from: str | None = setting(None, "checkpoint of an interrupted run to go on from", path=True)
    resume_weights_only: bool = setting(
        False, "with resume_from: start a new optimisation from the checkpoint's weights, with any other keys"
    )
    resume_allow: tuple[str, ...] = setting(
        [], "with resume_from: keys (also data, world_size) that may differ from the checkpoint; then it is not exact"
    )
    checkpoint_every_n_steps: int = setting(
        0, "extra checkpoint interval in optimizer steps; 0: validation only", low=0
    )
    save_top_k: int = setting(2, "best checkpoints kept", low=0)

    # Evaluation after training
    evaluate: bool = setting(
        False, "after training run probe, retrieval and zero-shot evaluation; with clm, write and score reports"
    )
    eval_split: str = setting("test", "split that is evaluated", choices=["train", "val", "test"])
    eval_bootstrap: int = setting(1000, "bootstrap draws of each interval", low=1, high=100000)
    eval_findings: tuple[str, ...] = setting(
        [], "scored abnormalities, of the 18 CT-RATE names; empty: all 18", choices=CT_RATE_LABELS
    )
    eval_prompt_positive: str = setting("{finding} is present.", "zero-shot prompt of a finding that is there")
    eval_prompt_negative: str = setting("No {finding}.", "zero-shot prompt of a finding that is absent")
    eval_probe_cases: int = setting(2000, "training volumes the linear probe is fitted on, at most", low=20)

    @property
    def volume_size(self) -> tuple[int, int, int]:
        """Voxels (D, H, W) of the encoder's input: the value of `image_size` spelled out."""
        return resolve_volume_size(self.image_size)

    @property
    def token_count(self) -> int:
        """Image tokens N = (D/32)(H/32)(W/32)."""
        depth, height, width = self.volume_size
        return depth * height * width // self.patch_size**3

    @property
    def active_losses(self) -> tuple[str, ...]:
        """Objectives with a positive weight, in the published order."""
        return tuple(name for name in LOSSES if self.loss_names[name] > 0)

    def to_dict(self) -> dict[str, Any]:
        """Every key as plain JSON types (lists, no tuples), as stored in run folders."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_dict_without_places(self) -> dict[str, Any]:
        """Like :meth:`to_dict`, of places on disk only the last name: for checkpoints, which travel."""
        values = self.to_dict().items()
        return {name: Path(value).name if name in PLACES and value else value for name, value in values}


PLACES = tuple(field.name for field in dataclasses.fields(MG3DConfig) if field.metadata["path"])
"""Keys that are places on disk."""


@functools.cache
def _declarations() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(MG3DConfig)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(MG3DConfig)}


def config_defaults() -> dict[str, Any]:
    """Default of every key as plain JSON types (a fresh copy)."""
    return {name: plain(field.metadata["default"]) for name, (field, _) in _declarations().items()}


def key_table() -> list[tuple[str, Any, str, str]]:
    """Every key with its default, what it allows in words, and its meaning, in the order of the sections."""
    return [
        (name, plain(field.metadata["default"]), describe(field, hint), field.metadata["doc"])
        for name, (field, hint) in _declarations().items()
    ]


def resolve_config(values: Mapping[str, Any] | None = None) -> MG3DConfig:
    """Check a (partial) dictionary of keys and return the frozen config.

    Args:
        values: key -> value; missing keys take their default. ``loss_names`` may name some objectives only: the others
            are 0 then. Absent, it has the published weights.

    Returns:
        The typed config.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, or keys that contradict each other.
    """
    given = dict(values or {})
    declarations = _declarations()
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in declarations:
            raise _unknown_key(name, value)
        field, hint = declarations[name]
        _refuse_transform(name, value)
        checked[name] = check_value(name, _normalise(name, value, hint), field, hint)
        if field.metadata["path"] and isinstance(checked[name], str):
            checked[name] = _expand_home(checked[name])
    if "loss_names" in checked:
        checked["loss_names"] = _complete_losses(checked["loss_names"])
    config = _derive(MG3DConfig(**checked))
    check_config(config)
    return config


def _derive(config: MG3DConfig) -> MG3DConfig:
    """Values that follow from other keys: negatives for itm, the sizes of a tiny encoder. Applying it twice is safe.

    The published token width of an encoder, set by a named config, says nothing about its tiny form.
    """
    if config.loss_names["itm"] > 0 and config.draw_false_image == 0:
        config = dataclasses.replace(config, draw_false_image=1)
    if config.vision_encoder_size == "tiny":
        options = plain(TINY_ENCODERS[config.vision_encoder]) | config.vision_encoder_options
        published = 320 if config.vision_encoder.startswith("nnunet") else 768
        width = None if config.input_image_embed_size == published else config.input_image_embed_size
        config = dataclasses.replace(config, vision_encoder_options=options, input_image_embed_size=width)
    return config


def _unknown_key(name: str, value: Any) -> ConfigError:
    near = suggest(name, list(_declarations()))
    remedy = f"write {near}=..." if near else "list the keys with: python main.py print_config"
    return ConfigError(f"{name}={value!r}: there is no such key", remedy)


def _refuse_transform(name: str, value: Any) -> None:
    """Say why a published image pipeline of the 2-D tasks is refused."""
    if name not in ("train_transform_keys", "val_transform_keys"):
        return
    for key, reason in TRANSFORM_HINTS.items():
        if key in (value if isinstance(value, list | tuple) else str(value).strip("[]").split(",")):
            raise ConfigError(f"{name}={value!r}: {key} is refused, {reason}\n  allowed: clip", f"write {name}=[clip]")


def _normalise(name: str, value: Any, hint: Any) -> Any:
    """Accept other spellings of a value: precision as text, an empty resume_from, an unquoted list of words."""
    if isinstance(value, str) and hint == tuple[str, ...]:
        return [word.strip(" \"'") for word in value.strip("[]() ").split(",") if word.strip()]
    if name == "precision" and isinstance(value, str):
        spelled = {"16-mixed": 16, "16": 16, "32": 32, "32-true": 32, "bf16-mixed": "bf16"}
        return spelled.get(value, value)
    if name == "resume_from" and value == "":
        return None
    return value


def _expand_home(text: str) -> str:
    import os

    return os.path.expanduser(text) if text.startswith("~") else text


def _complete_losses(weights: Mapping[str, float]) -> dict[str, float]:
    """All live objectives with their weight; refuses unknown and planned ones."""
    for name, weight in weights.items():
        if name in LATER_LOSSES and weight == 0:
            continue
        if name in LATER_LOSSES:
            raise ConfigError(
                f"loss_names.{name}={weight!r}: this objective is planned for a later round",
                f"use one of {', '.join(LOSSES)}",
            )
        if name not in LOSSES:
            near = suggest(name, LOSSES)
            raise ConfigError(
                f"loss_names.{name}={weight!r}: there is no such objective\n  allowed: {', '.join(LOSSES)}",
                f"write loss_names.{near}={weight}" if near else "leave it out",
            )
    return {name: float(weights.get(name, 0.0)) for name in LOSSES}
