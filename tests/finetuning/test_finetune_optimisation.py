"""Schedules, layer-wise rates and freezing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config
from mg3d.models.finetune.layer_decay import encoder_stage, freeze_encoder, parameter_groups
from mg3d.models.finetune.schedule import build_optimization, learning_rate_factor, reference_factor
from mg3d.models.vision_encoders import create_vision_encoder

PUBLISHED = [
    0, 0.25, 0.5, 0.75, 1, 1, 0.989074, 0.956773, 0.904508, 0.834565, 0.75, 0.654508, 0.552264, 0.447736, 0.345492,
    0.25, 0.165435, 0.095492, 0.043227, 0.010926, 0,
]  # fmt: skip
"""Spec downstream 0.6, base rate 1, W = 5, M = 20, t = 0..20."""


def test_reference_schedule_is_the_measured_one() -> None:
    assert [reference_factor(t, 5, 20) for t in range(21)] == pytest.approx(PUBLISHED, abs=1e-6)
    assert reference_factor(22, 5, 20) > 0  # past its end it climbs again, as measured
    assert [reference_factor(t, 1, 4) for t in range(3)] == pytest.approx([0, 1, 0.75])


def test_clean_schedule_starts_above_zero_and_stays_at_its_end() -> None:
    factors = [learning_rate_factor(t, 5, 20) for t in range(30)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == 1.0 and min(factors[:20]) > 0 and factors[20:] == [0.0] * 10
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert learning_rate_factor(0, 0, 10) == 1.0
    assert [learning_rate_factor(t, 2, 10, "constant") for t in range(4)] == [0.5, 1, 1, 1]


def rates(cfg: FinetuneConfig, steps: int) -> list[float]:
    """Rates of the head in the steps of a run."""
    encoder = create_vision_encoder("unet", base_width=2)
    module = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 1)})
    made = build_optimization(module, encoder, cfg, steps)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    head = next(k for k, group in enumerate(optimizer.param_groups) if group["name"].startswith("head"))
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[head]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_rate_changes_by_step_or_by_epoch() -> None:
    by_epoch = {"max_epoch": 4, "learning_rate": 1.0, "warmup_epochs": 2.0, "schedule_interval": "epoch"}
    clean = rates(resolve_finetune_config(by_epoch), 12)
    assert clean == pytest.approx([0.5] * 3 + [1.0] * 3 + [1.0] * 3 + [0.5] * 3)
    published = rates(resolve_finetune_config({**by_epoch, "protocol": "reference"}), 12)
    assert published[:3] == [0, 0, 0], "as published the whole first epoch runs at rate 0"
    by_step = rates(resolve_finetune_config({**by_epoch, "schedule_interval": "step"}), 12)
    assert by_step[:6] == pytest.approx([k / 6 for k in range(1, 7)]) and by_step[-1] > 0


SIZES = {
    "swin_b": {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4},
    "unet": {"base_width": 2},
    "nnunet": {"features_per_stage": [4, 4, 4, 4, 4, 4]},
}


@pytest.mark.parametrize("name", list(SIZES))
def test_layer_decay_slows_what_is_near_the_voxels(name: str) -> None:
    encoder = create_vision_encoder(name, **SIZES[name])
    module = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 1)})
    cfg = resolve_finetune_config({"layer_decay": 0.5, "learning_rate": 1.0, "weight_decay": 0.1})
    groups = parameter_groups(module, encoder, cfg)
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    rate = {group["name"].removesuffix("_no_decay"): group["lr"] for group in groups}
    last = max(int(stage.removeprefix("stage")) for stage in rate if stage != "head")
    assert rate["head"] == 1.0
    assert all(rate[stage] == 0.5 ** (last + 1 - int(stage[5:])) for stage in rate if stage != "head")
    assert {group["weight_decay"] for group in groups if group["name"].endswith("_no_decay")} == {0.0}
    published = parameter_groups(module, encoder, dataclasses.replace(cfg, protocol="reference"))
    assert {group["weight_decay"] for group in published} == {0.1}


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("keys", [{"freeze": "stages_2"}, {"freeze": "encoder"}, {"mode": "linear_probe"}])
def test_freezing(name: str, keys: dict[str, str]) -> None:
    encoder = create_vision_encoder(name, **SIZES[name])
    total = encoder.parameter_count()
    frozen = freeze_encoder(encoder, resolve_finetune_config(keys))
    trained = {encoder_stage(each) for each, parameter in encoder.named_parameters() if parameter.requires_grad}
    if keys == {"freeze": "stages_2"}:
        assert min(trained) == 2 and 0 < frozen < total
    else:
        assert not trained and frozen == total
    norms = [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    still = [part for part in norms if not next(part.parameters()).requires_grad]
    assert not any(part.training for part in still)


def test_nothing_to_train_is_refused() -> None:
    encoder = create_vision_encoder("unet", base_width=2)
    freeze_encoder(encoder, resolve_finetune_config({"freeze": "encoder"}))
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(encoder, encoder, resolve_finetune_config())
    assert not torch.is_grad_enabled() or all(not p.requires_grad for p in encoder.parameters())
