"""Collectives of the losses: gathers with a stated gradient, and means over all processes.

Every function is the identity (or the plain local value) when no process group is running, so one process needs
nothing.

Gather modes, used wherever a loss compares samples with each other:

* ``"global"``: all ranks' samples; the backward pass sums over the ranks. When every rank computes the loss of the
  whole batch, the gradient averaging of DistributedDataParallel then yields exactly the gradient of one process with
  all samples.
* ``"published_reference"``: all ranks' samples; the backward pass keeps the own slice (spec section 9), which
  averages to the global gradient divided by the number of processes.
* ``"local"``: the own samples only.

Collectives need the same batch size on every rank. Axes: B batch, S sentences, C channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

GATHER_MODES = ("global", "local", "published_reference")


def is_distributed() -> bool:
    """Return whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the index of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def check_mode(mode: str) -> None:
    """Refuse an unknown gather mode.

    Raises:
        ValueError: ``mode`` is not one of `GATHER_MODES`.
    """
    if mode not in GATHER_MODES:
        raise ValueError(f"gather mode {mode!r} is unknown: choose one of {', '.join(GATHER_MODES)}")


def _concatenate_ranks(x: Tensor) -> Tensor:
    """All ranks' ``x`` concatenated along axis 0 in rank order, without gradient."""
    # A bool travels as bytes: not every backend moves bools.
    sent = x.contiguous().to(torch.uint8) if x.dtype == torch.bool else x.contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(x.dtype)


class _Gather(torch.autograd.Function):
    """All-gather along axis 0 whose backward is the own slice, of the sum over the ranks or of the own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sum_gradients: bool) -> Tensor:
        """Concatenate the ranks' ``x``."""
        ctx.rows = x.shape[0]
        ctx.sum_gradients = sum_gradients
        return _concatenate_ranks(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the own rows."""
        grad = grad_outputs[0]
        if ctx.sum_gradients:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows], None


def gather_features(x: Tensor, mode: str = "global") -> Tensor:
    """Concatenate a tensor of all ranks along axis 0, in rank order.

    Args:
        x: ``[B, ...]``, the same shape on every rank. Tensors that are not floating point carry no gradient.
        mode: one of `GATHER_MODES`.

    Returns:
        ``[world_size * B, ...]``, or ``x`` itself for ``"local"`` and for one process.

    Raises:
        ValueError: unknown mode.
    """
    check_mode(mode)
    if mode == "local" or not is_distributed():
        return x
    if not x.is_floating_point():
        return _concatenate_ranks(x)
    return cast(Tensor, _Gather.apply(x, mode == "global"))


def gather_sentences(sen_BSC: Tensor, mask_BS: Tensor, mode: str = "global") -> tuple[Tensor, Tensor]:
    """Gather padded sentences: pad S to the largest S of all ranks, then concatenate along the batch.

    Args:
        sen_BSC: ``[B, S, C]``; S may differ from rank to rank.
        mask_BS: bool ``[B, S]``, True on real sentences.
        mode: one of `GATHER_MODES`. The published code forms sentence pairs within a rank only (spec section 9), so
            ``"published_reference"`` gathers nothing here.

    Returns:
        ``[world_size * B, S_max, C]`` and ``[world_size * B, S_max]``.

    Raises:
        ValueError: unknown mode.
    """
    check_mode(mode)
    if mode != "global" or not is_distributed():
        return sen_BSC, mask_BS
    longest = torch.tensor(sen_BSC.shape[1], device=sen_BSC.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    extra = int(longest) - sen_BSC.shape[1]
    padded = functional.pad(sen_BSC, (0, 0, 0, extra))
    return gather_features(padded, mode), gather_features(functional.pad(mask_BS, (0, extra)), mode)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over the ranks, detached from the graph."""
    total = x.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def global_mean(total: Tensor, count: Tensor | float, mode: str = "global") -> Tensor:
    """Turn a local sum into a mean over all processes that survives gradient averaging.

    Returns ``total * world_size / sum over ranks of count``: the average over the ranks of this value, and of its
    gradient, is exactly the mean that one process with all samples would compute. A zero count gives zero (with
    gradient zero).

    Args:
        total: scalar, the sum of the local terms.
        count: number of local terms (may be a fraction or a scalar tensor).
        mode: ``"global"``; the other modes of `GATHER_MODES` take the local mean, as the published code does.

    Returns:
        Scalar of the dtype of ``total``.

    Raises:
        ValueError: unknown mode.
    """
    check_mode(mode)
    terms = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    if mode != "global":
        return total / torch.where(terms > 0, terms, 1.0)
    terms = all_reduce_sum(terms)
    return total * (world_size() / torch.where(terms > 0, terms, 1.0))
