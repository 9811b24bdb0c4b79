from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mg3d.models.optimization import (
    build_optimizer_and_scheduler,
    build_parameter_groups,
    parameter_group_index,
    resolve_warmup_steps,
    schedule_factor,
    total_optimizer_steps,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = nn.Linear(2, 2)
        self.mlm_head = nn.Linear(2, 2)
        self.multi_modal_vision_proj = nn.Linear(2, 2)
        self.language_encoder = nn.Linear(2, 2).requires_grad_(False)


def test_factors_are_the_recorded_ones(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "lr_schedule.json").read_text(encoding="utf-8"))
    assert cases and all(case["values"] for case in cases)
    for case in cases:
        for value in case["values"]:
            factor = schedule_factor(
                value["step"],
                total_steps=case["total"],
                warmup_steps=case["warmup"],
                decay_power="cosine" if case["kind"] == "cosine" else case["power"],
                base_lr=case["base_lr"],
                end_lr=case["lr_end"],
            )
            assert factor == pytest.approx(value["factor"], rel=1e-9, abs=1e-12)
            assert 5 * case["base_lr"] * factor == pytest.approx(value["lr_x5"], rel=1e-9, abs=1e-18)


def test_groups_are_the_recorded_ones(golden_dir: Path, reference_dir: Path) -> None:
    recorded = json.loads((golden_dir / "e2e_tiny_losses.json").read_text(encoding="utf-8"))["param_group_of"]
    assert {name: parameter_group_index(name) for name in recorded} == recorded
    manifest = json.loads((reference_dir / "manifests" / "state_dict_manifest.json").read_text(encoding="utf-8"))
    entries = dict(manifest["common"])
    for encoder in manifest["vision_encoder"].values():
        entries |= dict(encoder["keys"])
    published = {name: entry["group"] for name, entry in entries.items() if entry.get("param")}
    assert len(published) > 600
    assert {name: parameter_group_index(name) for name in published} == published


def test_every_name_has_one_group() -> None:
    assert parameter_group_index("anything.weight") == 0
    assert parameter_group_index("multi_modal_x.itm_head.weight") == 2
    assert parameter_group_index("itc_cross_head.vision_ln.weight") == 0


def test_groups_hold_every_trainable_parameter_once() -> None:
    module = Small()
    groups = build_parameter_groups(module, learning_rate=1.0, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [1, 1, 5, 5, 5, 5]
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0.1, 0, 0.1, 0]
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1, 1, 1]
    with_frozen = build_parameter_groups(module, learning_rate=1.0, weight_decay=0.1, include_frozen=True)
    assert sum(len(group["params"]) for group in with_frozen) == len(list(module.parameters()))


def test_the_first_step_of_a_warm_up_changes_nothing_and_rates_follow_the_factor() -> None:
    module = Small()
    optimizer, scheduler = build_optimizer_and_scheduler(module, total_steps=10, learning_rate=0.1, warmup_steps=0.2)
    before = module.vision_encoder.weight.detach().clone()
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        module.mlm_head(module.vision_encoder(torch.ones(1, 2))).sum().backward()
        optimizer.step()
        scheduler.step()
        if len(rates) == 1:
            assert torch.equal(before, module.vision_encoder.weight)
    assert rates == pytest.approx([0, 0.05, 0.1, 0.0875])
    assert optimizer.param_groups[2]["lr"] == pytest.approx(5 * optimizer.param_groups[0]["lr"])
    assert not torch.equal(before, module.vision_encoder.weight)


def test_adam_couples_the_decay_and_adamw_does_not() -> None:
    def weight_after(optim_type: str) -> torch.Tensor:
        torch.manual_seed(0)
        module = Small()
        optimizer, _ = build_optimizer_and_scheduler(
            module, total_steps=5, learning_rate=0.01, weight_decay=0.5, optim_type=optim_type
        )
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return module.vision_encoder.weight.detach()

    torch.manual_seed(0)
    start = Small().vision_encoder.weight.detach()
    torch.testing.assert_close(weight_after("adamw"), start * (1 - 0.01 * 0.5))
    torch.testing.assert_close(weight_after("adam"), start - 0.01 * start.sign(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight_after("sgd"), start * (1 - 0.01 * 0.5))


@pytest.mark.parametrize(("kind", "betas"), [("adam", (0.9, 0.999)), ("adamw", (0.9, 0.98))])
def test_published_betas(kind: str, betas: tuple[float, float]) -> None:
    optimizer, _ = build_optimizer_and_scheduler(Small(), total_steps=5, learning_rate=0.1, optim_type=kind)
    assert all(group["betas"] == betas and group["eps"] == 1e-8 for group in optimizer.param_groups)


def test_schedule_survives_short_runs_and_overruns() -> None:
    assert schedule_factor(3, total_steps=2, warmup_steps=10) == pytest.approx(0.3)
    assert schedule_factor(5, total_steps=5, warmup_steps=5) == 0
    for power in (1.0, "cosine"):
        late = [
            schedule_factor(step, total_steps=10, warmup_steps=0, decay_power=power, base_lr=1, end_lr=0.1)
            for step in (0, 10, 11, 500)
        ]
        assert late == pytest.approx([1, 0.1, 0.1, 0.1])


def test_steps_are_counted_from_the_loader() -> None:
    assert total_optimizer_steps(10, 3, accumulate=4) == 9
    assert resolve_warmup_steps(0.1, 55) == 5 and resolve_warmup_steps(7, 55) == 7


@pytest.mark.parametrize(
    "options",
    [
        {"optim_type": "lion"},
        {"decay_power": "linear"},
        {"total_steps": 0},
        {"warmup_steps": -1},
        {"warmup_steps": 1.5},
    ],
)
def test_bad_settings_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_optimizer_and_scheduler(Small(), **({"total_steps": 5, "learning_rate": 0.1} | options))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer_and_scheduler(nn.Linear(1, 1).requires_grad_(False), total_steps=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="at least one"):
        total_optimizer_steps(0, 1)
