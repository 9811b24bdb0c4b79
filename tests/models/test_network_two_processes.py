"""The whole network on two local processes against one process with all studies."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_network import enlarge, take, tiny_batch, tiny_network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mg3d.models.network import MG3DNetwork
from mg3d.models.objectives import OBJECTIVES

WORLD = 2
COUNTS = (3, 0, 5, 1)
"""Sentences per study; the ranks differ in reports with text, labelled words and longest report."""


def total_and_accuracy(net: MG3DNetwork, batch: dict) -> tuple[Tensor, Tensor]:
    """Unweighted sum of all objectives, and the share of masked words that are predicted."""
    terms = net(batch)
    losses = [found[f"{name}_loss"] for name, found in terms.items()]
    return torch.stack(losses).sum(), terms["sen_mlm"]["accuracy"].detach()


class Total(nn.Module):
    def __init__(self, net: MG3DNetwork) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        return total_and_accuracy(self.net, batch)


def network(kind: str) -> MG3DNetwork:
    return enlarge(tiny_network(objectives=tuple(OBJECTIVES), memory_queue=kind, memory_queue_size=6)).train()


def studies(seed: int) -> dict:
    """Four volumes of different brightness: to normalise nearly equal features would only enlarge rounding."""
    batch = tiny_batch(COUNTS, seed, false_images=1)
    batch["image"] = batch["image"] * torch.linspace(0.25, 1.0, len(COUNTS)).view(-1, 1, 1, 1, 1)
    return batch


def result(net: MG3DNetwork, losses: list[Tensor], accuracies: list[Tensor]) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    buffers = {name: value.float() for name, value in net.named_buffers() if "itc" in name or "xbm" in name}
    return {"loss": torch.stack(losses).detach(), "accuracy": torch.stack(accuracies), **grads, **buffers}


def on_rank(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    wrapped = DistributedDataParallel(Total(network(kind)), find_unused_parameters=True)
    size = len(COUNTS) // WORLD
    rows = list(range(rank * size, (rank + 1) * size))
    losses, accuracies = [], []
    for seed in (0, 1):  # the second step meets the memories that the first one filled
        wrapped.zero_grad()
        loss, accuracy = wrapped(take(studies(seed), rows))
        loss.backward()
        mean = loss.detach() / WORLD
        dist.all_reduce(mean)
        losses.append(mean)
        accuracies.append(accuracy)
    torch.save(result(wrapped.module.net, losses, accuracies), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "xbm"])
def test_two_processes_equal_one_with_all_studies(tmp_path: Path, kind: str):
    mp.spawn(on_rank, args=(str(tmp_path), kind), nprocs=WORLD)
    net, losses, accuracies = network(kind), [], []
    for seed in (0, 1):
        net.zero_grad()
        loss, accuracy = total_and_accuracy(net, studies(seed))
        loss.backward()
        losses.append(loss)
        accuracies.append(accuracy)
    wanted = result(net, losses, accuracies)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found.pop("loss"), wanted["loss"], rtol=1e-5, atol=1e-5)
        assert found.keys() == wanted.keys() - {"loss"}
        for name, value in found.items():
            allowed = 1e-5 * max(float(wanted[name].abs().max()), 1.0)
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")
