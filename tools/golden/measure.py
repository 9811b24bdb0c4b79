"""Quantities the format stores that no module returns: norms of gradients and of one optimiser step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer


def gradient_norms(module: nn.Module) -> dict[str, float]:
    """L2 norm of every trainable parameter's gradient; parameters without one (or with all zeros) are left out."""
    return {
        name: float(parameter.grad.norm())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is not None and parameter.grad.count_nonzero()
    }


def step_ranges(module: nn.Module, optimizer: Optimizer, floor: float) -> dict[str, tuple[float, float]]:
    """Range the L2 norm of the first Adam step must lie in, for every trainable parameter.

    The first step of an entry is its rate times g / (|g| + eps). Where the true gradient is zero (the key third of an
    attention bias) g is rounding noise and the step any value up to the rate: such entries, below ``floor``, count from
    nothing to the full rate; all others as they are.

    Args:
        module: network with gradients.
        optimizer: its optimiser, not stepped yet.
        floor: gradient entry below which a step is not determined.

    Returns:
        Parameter name -> (lowest, highest) norm.
    """
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trainable.items()}
    optimizer.step()
    ranges = {}
    for name, value in trainable.items():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        noise = (gradient.abs() < floor) & (gradient != 0)
        certain = (value.detach() - before[name]).masked_fill(noise, 0.0).square().sum()
        highest = certain + int(noise.sum()) * rates[id(value)] ** 2
        ranges[name] = (float(certain.sqrt()), float(highest.sqrt()))
    return ranges


def cube_edge(cells: int) -> int:
    """Edge of a cube of that many cells."""
    return round(cells ** (1 / 3))


def window_edge(table_rows: int) -> int:
    """Edge of the cubic attention window whose bias table has that many rows, one per offset of two cells."""
    return (cube_edge(table_rows) + 1) // 2


def root_mean_square(norm: float, count: int) -> float:
    """Root mean square of the ``count`` entries of a tensor with that L2 norm."""
    return norm / count**0.5
