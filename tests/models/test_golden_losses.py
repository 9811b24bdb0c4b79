"""Twenty steps of every objective on one batch: losses stay the recorded ones, whatever else changes."""

from __future__ import annotations

import pytest
import torch
from tiny_network import enlarge, tiny_batch, tiny_network, total_loss

from mg3d.models.objectives import OBJECTIVES

STEPS = 20
RECORDED: dict[str, tuple[float, ...]] = {
    "sen_mlm": (5.021055, 4.923087, 4.226822, 3.781288),
    "swin_unetr_mim": (0.200771, 0.197175, 0.187042, 0.167872),
    "local_itc": (2.352136, 2.26249, 2.21727, 2.206817),
    "itc": (1.149609, 0.980934, 0.411333, 0.25818),
    "itm": (0.709295, 0.709087, 0.707525, 0.705795),
}
"""Loss before step 1, 2, 10 and 20 (plain SGD)."""


def losses(name: str) -> list[float]:
    kind = torch.float32 if name == "itc" else torch.float64  # its normalisation computes in float32
    net = enlarge(tiny_network(objectives=(name,))).to(kind).train()
    batch = tiny_batch((3, 0, 5, 2), seed=3, false_images=2 if name == "itm" else 0)
    batch = {k: v.to(kind) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = total_loss(net, batch)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_every_objective_is_recorded() -> None:
    assert set(RECORDED) == set(OBJECTIVES)


@pytest.mark.parametrize("name", RECORDED)
def test_losses_of_twenty_steps_are_the_recorded_ones(name: str) -> None:
    found = losses(name)
    assert [found[step - 1] for step in (1, 2, 10, 20)] == pytest.approx(list(RECORDED[name]), rel=1e-4)
