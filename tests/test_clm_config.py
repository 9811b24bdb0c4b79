"""Words of report writing: the published command line, its notices, and contradictions."""

from __future__ import annotations

import pytest

from mg3d.config import ex
from mg3d.config_cli import compose_config, parse_command_line
from mg3d.errors import ConfigError

PUBLISHED = (
    "seed=0 data_root=/data/arrows num_gpus=1 per_gpu_batchsize=2 num_nodes=1 task_finetune_clm_ctrg_chest_vision_only "
    "clip32 text_roberta image_size=224 clip_resizedcrop tokenizer=allenai/biomed_roberta_base "
    "pseudo_vision_token_pool_size=0 pseudo_langauge_token_pool_size=0 load_path=/weights/mg3d.ckpt"
)


def test_published_command_line_resolves() -> None:
    config = compose_config(ex, PUBLISHED.split())
    expected = {
        "exp_name": "task_finetune_clm_ctrg_chest_vision_only", "datasets": ("clm_chest_ctrg",), "vision_only": True,
        "per_gpu_batchsize": 2, "volume_size": (128, 96, 128), "train_transform_keys": ("volume_resizedcrop",),
        "val_transform_keys": ("clip",), "tokenizer": "allenai/biomed_roberta_base", "vocab_size": 50265,
        "clm_num_beams": 5, "clm_do_sample": True, "clm_max_text_len": 256, "active_losses": ("clm",),
        "load_path": "/weights/mg3d.ckpt", "learning_rate": 5e-6, "lr_multiplier_head": 50.0, "warmup_steps": 0.1,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected


def test_two_dimensional_words_are_accepted_with_one_line_each() -> None:
    notices = parse_command_line(ex, ["check", "with", *PUBLISHED.split()]).notices
    assert [notice.split(":")[1].strip() for notice in notices] == ["clip32", "clip_resizedcrop", "image_size=224"]
    assert all("\n" not in notice for notice in notices)
    assert parse_command_line(ex, ["check", "with", "task_pretrain_mg3d", "image_size=128"]).notices == ()


def test_the_twin_writes_ct_rate() -> None:
    ours, twin = (
        compose_config(ex, [f"task_finetune_clm_{name}_vision_only"]).to_dict() for name in ("ctrg_chest", "ct_rate")
    )
    assert {key for key in ours if ours[key] != twin[key]} == {"exp_name", "datasets"}
    assert twin["datasets"] == ["clm_ct_rate"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("task_finetune_clm_ct_rate_vision_only vision_only=False", "write vision_only=True"),
        ("task_finetune_clm_ct_rate_vision_only loss_names.itc=1", "trains alone"),
        ("task_finetune_clm_ct_rate_vision_only sent_level=True", "whole reports"),
        ("task_finetune_clm_ct_rate_vision_only fragment_separator=none_reference", "whole reports"),
        ("task_finetune_clm_ct_rate_vision_only image_only=True", "clm"),
        ("task_finetune_clm_ct_rate_vision_only cache_image_tokens=True", "freeze_image_encoder=True"),
        (
            "task_finetune_clm_ct_rate_vision_only clip_resizedcrop freeze_image_encoder=True cache_image_tokens=True",
            "train_transform_keys=[clip]",
        ),
        ("task_pretrain_mg3d vision_only=True", "write vision_only=False"),
        ("task_pretrain_mg3d freeze_image_encoder=True", "loss_names.clm"),
        ("task_pretrain_mg3d clm_standardise=8", "write clm_standardise=0"),
        ("task_finetune_clm_ct_rate_vision_only clm_standardise=1", "no spread"),
        ("task_finetune_clm_ct_rate_vision_only clm_num_beams=0", ">= 1"),
        ("task_finetune_clm_ct_rate_vision_only language_only=True", "there is no other text"),
    ],
)
def test_contradictions_are_refused_with_the_mend(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        compose_config(ex, words.split())
    assert said in str(refusal.value) and "mend:" in str(refusal.value)
