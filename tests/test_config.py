"""The typed config: defaults, composition, types, ranges and the published names, each by its status."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mg3d.config import ex
from mg3d.config_cli import compose_config, parse_command_line
from mg3d.config_named import NAMED_CONFIGS
from mg3d.config_schema import LOSSES, MG3DConfig, config_defaults, key_table, resolve_config
from mg3d.config_status import DEAD_KEYS, LATER_KEYS, PLANNED_NAMED_CONFIGS
from mg3d.errors import ConfigError

PUBLISHED_COMMAND = (
    "seed=0 data_root=/data/arrows num_gpus=1 num_nodes=1 task_pretrain_ptunifier per_gpu_batchsize=4 vit3d16 "
    "text_radbert image_size=128 max_text_len=250 tokenizer=StanfordAIMI/RadBERT"
)


def compose(line: str) -> MG3DConfig:
    """Config of a command line, composed by Sacred."""
    return compose_config(ex, line.split())


def test_published_defaults() -> None:
    config = resolve_config({})
    published = {
        "seed": 0, "datasets": ("clm_chest_ctrg",), "batch_size": 4, "per_gpu_batchsize": 4, "image_size": 128,
        "max_text_len": 250, "tokenizer": "StanfordAIMI/RadBERT", "vocab_size": 28996, "mlm_prob": 0.15,
        "whole_word_masking": True, "sent_level": False, "num_top_layer": 2, "hidden_size": 768, "drop_rate": 0.1,
        "optim_type": "adam", "learning_rate": 2e-5, "weight_decay": 1e-8, "decay_power": 1.0, "end_lr": 0.0,
        "warmup_steps": 10000, "lr_multiplier_head": 5.0, "lr_multiplier_multi_modal": 5.0, "num_workers": 8,
        "precision": 16, "cl_temp": 0.1, "data_frac": 1.0, "draw_false_image": 0, "mim_mask_ratio": 0.5,
        "mim_window": 16, "log_dir": "result", "data_root": "data/pretrain_arrows", "patch_merging": "legacy",
        "fusion_variant": "mean", "image_feature_reuse": "encoder", "text_encoder_eval": True,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in published} == published
    assert config.loss_names == dict.fromkeys(LOSSES, 0.0) | {"sen_mlm": 1.0, "swin_unetr_mim": 1.0, "local_itc": 0.1}
    assert config.active_losses == ("sen_mlm", "swin_unetr_mim", "local_itc")


@pytest.mark.smoke
def test_published_pretraining_command_resolves_exactly() -> None:
    config = compose(PUBLISHED_COMMAND)
    expected = {
        "exp_name": "task_pretrain_mg3d", "seed": 0, "data_root": "/data/arrows", "num_gpus": 1, "num_nodes": 1,
        "datasets": ("clm_chest_ctrg",), "per_gpu_batchsize": 4, "batch_size": 4, "image_size": 128, "patch_size": 32,
        "train_transform_keys": ("clip",), "val_transform_keys": ("clip",), "max_text_len": 250, "sent_level": True,
        "tokenizer": "StanfordAIMI/RadBERT", "vocab_size": 28996, "learning_rate": 1e-5, "weight_decay": 1e-8,
        "warmup_steps": 10000, "max_epoch": 60, "max_steps": 300000, "input_image_embed_size": 768,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.volume_size == (128, 96, 128)
    assert config.loss_names == dict.fromkeys(LOSSES, 0.0) | {"sen_mlm": 1.0, "swin_unetr_mim": 1.0, "local_itc": 0.1}


def test_published_placeholders_are_accepted() -> None:
    config = compose(
        "task_pretrain_ptunifier devices=[5] vit=ViT-B/16 pseudo_vision_token_pool_size=0 resume_from=None "
        "pseudo_langauge_token_pool_size=0 num_pseudo_vision_tokens=0 num_heads=12 loss_names.vqa=0 precision=16-mixed"
    )
    assert config.devices == (5,) and config.resume_from is None and config.precision == 16
    assert set(config.loss_names) == set(LOSSES)


@pytest.mark.parametrize("name", list(NAMED_CONFIGS))
def test_every_named_config_resolves_alone_and_with_tiny(name: str) -> None:
    compose(f"{name}")
    tiny = compose(f"task_pretrain_mg3d {name} tiny")
    assert tiny.image_size == (64, 32, 64) and tiny.max_steps == 2 and tiny.num_workers == 0
    assert tiny.vision_encoder_options, "tiny shrinks every encoder"


def test_later_named_config_wins_and_override_wins_over_both() -> None:
    assert compose("vit3d32 vit3d16").image_size == 160
    assert compose("vit3d16 vit3d32").image_size == 224
    assert compose("image_size=96 vit3d32 vit3d16").image_size == 96


def test_task_sets_every_objective() -> None:
    for name, (_, keys) in NAMED_CONFIGS.items():
        if name.startswith("task_"):
            assert set(keys["loss_names"]) == set(LOSSES), name
    only = compose("task_pretrain_mg3d loss_names.itc=1 loss_names.local_itc=0")
    assert only.active_losses == ("sen_mlm", "swin_unetr_mim", "itc")


def test_tiny_encoder_sizes_follow_the_encoder_and_keep_overrides() -> None:
    assert compose("unet tiny").vision_encoder_options == {"base_width": 4}
    swin = compose("tiny swin_b vision_encoder_options.embed_dim=24")
    assert swin.vision_encoder_options["embed_dim"] == 24 and swin.vision_encoder_options["window_size"] == 4
    assert resolve_config(swin.to_dict()) == swin


def test_encoder_words_carry_the_token_width_and_the_last_one_wins() -> None:
    assert compose("task_pretrain_mg3d nnunet").input_image_embed_size == 320
    assert compose("nnunet swin_b").input_image_embed_size is None
    for words in ("nnunet tiny", "tiny nnunet", "tiny nnunet_resenc", "tiny vit3d16"):
        assert compose(words).input_image_embed_size is None, words
    assert compose("tiny unet input_image_embed_size=64").input_image_embed_size == 64


@pytest.mark.parametrize(
    ("value", "size", "tokens"),
    [
        (96, (96, 96, 96), 27),
        (128, (128, 96, 128), 48),
        (160, (64, 160, 160), 50),
        (192, (32, 192, 192), 36),
        (224, (128, 96, 128), 48),
        ([64, 32, 96], (64, 32, 96), 6),
    ],
)
def test_image_size_switch(value: Any, size: tuple[int, int, int], tokens: int) -> None:
    config = resolve_config({"image_size": value})
    assert config.volume_size == size and config.token_count == tokens


def test_itm_draws_a_false_image() -> None:
    assert resolve_config({"loss_names": {"itm": 1}}).draw_false_image == 1
    assert resolve_config({"loss_names": {"itm": 1}, "draw_false_image": 3}).draw_false_image == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": [100, 96, 128]}, "[96,96,128]"),
        ({"image_size": 100}, "multiples of 32"),
        ({"image_size": [96, 96]}, "2 numbers"),
        ({"image_size": [0, 32, 64]}, "[32,32,64]"),
        ({"image_size": [32, 32, 32]}, "one image token"),
        ({"seed": True}, "an integer"),
        ({"seed": -1}, ">= 0"),
        ({"batch_size": 0}, ">= 1"),
        ({"batch_size": 2.0}, "an integer"),
        ({"batch_size": "two"}, "an integer"),
        ({"batch_size": 6}, "per_gpu_batchsize=4"),
        ({"learning_rate": "abc"}, "a number"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": -1e-5}, ">= 0"),
        ({"mlm_prob": 1.5}, "<= 1"),
        ({"drop_rate": 1}, "< 1"),
        ({"test_only": "true"}, "write test_only=True"),
        ({"test_only": 1}, "True or False"),
        ({"datasets": ["clm_ct_rat"]}, "datasets=[clm_ct_rate]"),
        ({"datasets": []}, "no corpus"),
        ({"datasets": ["clm_ct_rate", "clm_ct_rate"]}, "twice"),
        ({"optim_type": "adamm"}, "write optim_type=adam"),
        ({"vision_encoder": "swinb"}, "write vision_encoder=swin_b"),
        ({"precision": 8}, "16, 32, bf16"),
        ({"warmup_steps": 2.5}, "fraction"),
        ({"decay_power": "cosin"}, "cosine"),
        ({"val_check_interval": 1.5}, "integer"),
        ({"hidden_size": 100}, "multiple of 8"),
        ({"mlp_ratio": 3}, "legacy_unused_modules"),
        ({"image_only": True}, "sen_mlm"),
        ({"loss_names": {"typo": 1}}, "no such objective"),
        ({"loss_names": {"vqa": 1}}, "planned"),
        ({"loss_names": {"sen_mlm": -1}}, ">= 0"),
        ({"loss_names": {"sen_mlm": "1"}}, "dictionary"),
        ({"loss_names": {"sen_mlm": 0}}, "nothing would be trained"),
        ({"mim_window": 10}, "does not divide"),
        ({"ssm_negative_threshold": 0.95}, "ssm_positive_threshold"),
        ({"train_transform_keys": ["clip_resizedcrop"]}, "every slice on its own"),
        ({"exp_name": "a/b"}, "cannot name a folder"),
        ({"tokenizer": ""}, "local directory"),
        ({"devices": [-1]}, ">= 0"),
        ({"max_steps": 0}, ">= 1"),
        ({"learning_rat": 1}, "learning_rate"),
    ],
)
def test_bad_values_are_refused_with_the_mend(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_config(values)
    text = str(refusal.value)
    assert words in text and "mend:" in text and len(text.splitlines()) <= 4
    assert next(iter(values)) in text


def test_values_arrive_in_their_types() -> None:
    config = resolve_config({"cl_temp": 1, "warmup_steps": 0.1, "datasets": "[clm_ct_rate, clm_chest_ctrg]"})
    assert isinstance(config.cl_temp, float) and config.warmup_steps == 0.1
    assert config.datasets == ("clm_ct_rate", "clm_chest_ctrg")
    assert resolve_config({"warmup_steps": 5}).warmup_steps == 5
    assert resolve_config({"data_root": "~/arrows"}).data_root.endswith("/arrows")
    assert "~" not in resolve_config({"data_root": "~/arrows"}).data_root


def test_config_is_frozen_plain_json_and_repeats_itself() -> None:
    config = resolve_config({"image_size": [64, 32, 64], "vision_encoder_options": {"depths": [1, 1, 1, 1]}})
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["image_size"] == [64, 32, 64] and resolve_config(stored) == config
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
    config_defaults()["loss_names"]["itc"] = 5
    assert config_defaults()["loss_names"]["itc"] == 0


def test_every_key_has_a_meaning_and_an_allowed_range() -> None:
    rows = key_table()
    assert [name for name, *_ in rows] == list(config_defaults())
    assert all(allowed and len(meaning) > 5 for _, _, allowed, meaning in rows)


def test_dead_and_planned_words_are_refused_by_name() -> None:
    for key in DEAD_KEYS:
        with pytest.raises(ConfigError, match="no effect"):
            parse_command_line(ex, ["check", "with", f"{key}=1"])
    for key in LATER_KEYS:
        with pytest.raises(ConfigError, match="planned"):
            parse_command_line(ex, ["check", "with", f"{key}=1"])
    for name in PLANNED_NAMED_CONFIGS:
        with pytest.raises(ConfigError, match="planned"):
            parse_command_line(ex, ["check", "with", name])
    assert not set(DEAD_KEYS) & set(config_defaults()) and not set(LATER_KEYS) & set(config_defaults())


PUBLISHED_KEYS = set(
    """
    batch_size cl_temp clm_do_sample clm_max_text_len clm_num_beams data_frac data_root datasets decay_power
    default_root_dir devices draw_false_image draw_false_text drop_rate end_lr exp_name fast_dev_run
    get_recall_metric hidden_size image_only image_size input_image_embed_size input_text_embed_size
    label_column_name label_size language_only learning_rate load_path log_dir loss_names lr_multiplier_head
    lr_multiplier_multi_modal max_epoch max_steps max_text_len mim_layer mim_prob mlc_label_size mlm_prob
    mlp_ratio norm_pix_loss num_gpus num_heads num_layers num_nodes num_pseudo_langauge_tokens
    num_pseudo_vision_tokens num_top_layer num_workers optim_type patch_size patch_size_squeeze
    per_gpu_batchsize precision pseudo_langauge_token_pool_size pseudo_vision_token_pool_size resume_from seed
    sent_level test_only tokenizer train_transform_keys val_check_interval val_transform_keys vision_only vit
    vocab_size vqa_label_size warmup_steps weight_decay whole_word_masking
    """.split()
)


@pytest.mark.smoke
def test_every_published_key_has_a_status() -> None:
    """Each published key is live, dead, planned or without effect; none is missing."""
    from mg3d.config_status import NO_EFFECT_KEYS

    known = {*config_defaults(), *DEAD_KEYS, *LATER_KEYS, *NO_EFFECT_KEYS}
    assert len(PUBLISHED_KEYS) > 60 and known >= PUBLISHED_KEYS, PUBLISHED_KEYS - known


@pytest.mark.realdata
def test_the_published_keys_are_those_of_the_specification(shared_dir: Any) -> None:
    rows = (
        (shared_dir / "spec" / "config_keys.md")
        .read_text(encoding="utf-8")
        .split("|---|---|---|---|---|\n")[1]
        .split("\n\n")[0]
    )
    keys = [key.strip() for row in rows.splitlines() for key in row.split("|")[1].replace(" / ", ",").split(",")]
    assert {key.split(" ")[0] for key in keys} - {"mim_decoder_*"} == PUBLISHED_KEYS


def test_config_file_of_a_run_stands_for_a_named_config(tmp_path: Any) -> None:
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(resolve_config({"seed": 7, "image_size": [64, 32, 64]}).to_dict()))
    again = compose(f"{stored} max_steps=3")
    assert (again.seed, again.volume_size, again.max_steps) == (7, (64, 32, 64), 3)
    stored.write_text('{"seed": 8}')
    assert compose(f"{stored}").seed == 8
    stored.write_text('{"nonsense": 1}')
    with pytest.raises(ConfigError, match="nonsense"):
        parse_command_line(ex, ["check", "with", str(stored)])
