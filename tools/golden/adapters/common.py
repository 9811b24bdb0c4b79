"""What most adapters share: strict loading, leaf inputs, and the comparison of outputs and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tools.golden.bundle import Bundle
from tools.golden.index import GoldenError


def loaded(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The module in evaluation mode with the stored state, loaded strictly."""
    module.load_state_dict(dict(state), strict=True)
    return module.eval()


def leaf(bundle: Bundle, name: str) -> Tensor:
    """A stored input as a leaf that collects a gradient."""
    return bundle.read(name).clone().requires_grad_()


def sequence(bundle: Bundle, prefix: str) -> list[Tensor]:
    """Stored inputs ``prefix.0``, ``prefix.1``, ... in order, as leaves."""
    names = sorted(bundle.names(f"{prefix}."), key=lambda name: int(name.rsplit(".", 1)[1]))
    return [leaf(bundle, name) for name in names]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lists of ``[1, S_b, C]`` as ``[B, S, C]`` with its mask ``[B, S]``."""
    values = nn.utils.rnn.pad_sequence([row.squeeze(0) for row in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones(row.shape[1], dtype=torch.bool) for row in rows], batch_first=True, padding_value=False
    )
    return values, mask


def unpadded(values_BSC: Tensor, mask_BS: Tensor) -> list[Tensor]:
    """The inverse of :func:`padded`."""
    return [value[mask].unsqueeze(0) for value, mask in zip(values_BSC, mask_BS, strict=True)]


def check_gradients(
    bundle: Bundle, sources: Sequence[Tensor], seeds: Sequence[Tensor | None], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Differentiate ``sources`` and compare every gradient under its stored name.

    Args:
        bundle: the run.
        sources: outputs or losses to differentiate.
        seeds: their cotangents; None for a scalar.
        wanted: stored name -> leaf.

    Returns:
        Stored name -> gradient, zeros where a leaf takes no part.

    Raises:
        GoldenError: if a parameter listed as having no gradient got one.
    """
    gradients = torch.autograd.grad(list(sources), list(wanted.values()), list(seeds), allow_unused=True)
    found = {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(wanted.items(), gradients, strict=True)
    }
    for name, gradient in found.items():
        bundle.check(name, gradient, gradient=True)
    silent = bundle.config.get("params_without_gradient", [])
    moved = [name for name in silent if found.get(f"grad.param.{name}", torch.zeros(1)).count_nonzero()]
    if moved:
        raise GoldenError(f"{moved[0]} received a gradient, the reference gives it none")
    return found


def compare(
    bundle: Bundle, module: nn.Module | None, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> None:
    """Compare outputs, then the gradients of the sum of outputs times cotangents.

    Args:
        bundle: the run.
        module: its parameters are compared as ``grad.param.*``; None for a function.
        inputs: leaves compared as ``grad.in.*``.
        outputs: compared as ``out.*``, or under the bare name where the file stores it so.
    """
    for name, value in outputs.items():
        bundle.check(f"out.{name}", value)
        bundle.check(name, value)
    cotangents = bundle.cotangents(dict(outputs))
    if not cotangents:
        return
    wanted = {f"grad.in.{name}": value for name, value in inputs.items()}
    if module is not None:
        wanted |= {f"grad.param.{name}": value for name, value in module.named_parameters()}
    found = check_gradients(bundle, [outputs[name] for name in cotangents], list(cotangents.values()), wanted)
    names = bundle.config.get("grad_l2_names", [])
    if names:
        norms = torch.stack([found[f"grad.param.{name}"].norm() for name in names])
        bundle.check_norms("grad_l2", norms)
