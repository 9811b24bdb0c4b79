"""LayerNorm and MLP of a Swin block on a CPU, some rows at a time, with little kept for the backward pass.

The hidden layer is four times as wide as the grid and is needed twice (before and after GELU): 300 MB in one block of
the first stage at the published size. Here each core takes as many rows as fit its cache through both layers, and the
backward pass computes the hidden layer again from the same numbers. Sums over the rows are taken in a fixed order.

Shape suffixes: N rows (all grid positions), C channels, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mg3d.models.vision_encoders.worker_threads import run_shares, share_out

HIDDEN_BYTES = 2**20
"""Hidden values worked on at a time by each core: about its own cache."""


def can_fuse(norm: nn.LayerNorm, mlp: nn.Module, x: Tensor) -> bool:
    """Whether :func:`norm_mlp` computes ``mlp(norm(x))``: single precision on a CPU, without dropout.

    Args:
        norm: LayerNorm over the last axis.
        mlp: MONAI's ``MLPBlock`` with GELU.
        x: input.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    dropping = mlp.training and any(part.p > 0 for part in mlp.modules() if isinstance(part, nn.Dropout))
    plain = isinstance(mlp.fn, nn.GELU) and mlp.fn.approximate == "none"
    return plain and not dropping and norm.weight is not None and norm.weight.dtype == torch.float32


def norm_mlp(norm: nn.LayerNorm, mlp: nn.Module, x: Tensor) -> Tensor:
    """``linear2(gelu(linear1(norm(x))))``.

    Args:
        norm: LayerNorm over the last axis.
        mlp: has ``linear1`` and ``linear2``.
        x: ``[..., C]``, for which :func:`can_fuse` holds.

    Returns:
        The same shape.
    """
    layers: tuple[Any, Any] = mlp.linear1, mlp.linear2
    first, second = layers
    weights = norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias
    return _NormMLP.apply(x.flatten(0, -2), norm.eps, *weights).view(x.shape)


class _NormMLP(torch.autograd.Function):
    """Keeps only its input."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, eps: float, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_NC, *weights)
        ctx.eps = eps
        x_NC = x_NC.contiguous()
        gamma, beta, w1_HC, b1, w2_CH, b2 = weights
        result = torch.empty_like(x_NC)

        def work(share: list[slice]) -> None:
            for x, out, (hidden,) in _portions(share, (x_NC, result), len(b1), rooms=1):
                normed = torch.native_layer_norm(x, x.shape[1:], gamma, beta, eps)[0]
                torch.addmm(b1, normed, w1_HC.t(), out=hidden)
                torch.ops.aten.gelu_(hidden)
                torch.addmm(b2, hidden, w2_CH.t(), out=out)

        run_shares(work, _shares(len(x_NC)))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, *weights = ctx.saved_tensors
        x_NC, grad_NC = x_NC.contiguous(), grad_NC.contiguous()
        grad_x = torch.empty_like(x_NC)

        def work(share: list[slice]) -> list[Tensor]:
            sums = [torch.zeros_like(weight) for weight in weights]
            for x, grad, target, rooms in _portions(share, (x_NC, grad_NC, grad_x), len(weights[3]), rooms=3):
                _backward_rows(x, grad, target, rooms, weights, sums, ctx.eps)
            return sums

        found = run_shares(work, _shares(len(x_NC)))
        sums = [parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in zip(*found, strict=True)]
        return grad_x, None, *sums


def _backward_rows(
    x: Tensor,
    grad: Tensor,
    target: Tensor,
    rooms: tuple[Tensor, ...],
    weights: list[Tensor],
    sums: list[Tensor],
    eps: float,
) -> None:
    """Gradient of some rows, written to ``target``; what they add to the weights' gradients is added to ``sums``."""
    gamma, beta, w1_HC, b1, w2_CH, _ = weights
    hidden, activated, grad_hidden = rooms
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], gamma, beta, eps)
    torch.addmm(b1, normed, w1_HC.t(), out=hidden)
    torch.ops.aten.gelu.out(hidden, out=activated)
    sums[4].addmm_(grad.t(), activated)
    sums[5].add_(grad.sum(0))
    torch.mm(grad, w2_CH, out=grad_hidden)
    torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
    sums[2].addmm_(grad_hidden.t(), normed)
    sums[3].add_(grad_hidden.sum(0))
    grad_normed = torch.mm(grad_hidden, w1_HC)
    grad_x, grad_gamma, grad_beta = torch.ops.aten.native_layer_norm_backward(
        grad_normed, x, x.shape[1:], mean, rstd, gamma, beta, [True, True, True]
    )
    target.copy_(grad_x)
    sums[0].add_(grad_gamma)
    sums[1].add_(grad_beta)


def _shares(rows: int) -> list[list[slice]]:
    """Equal shares of consecutive rows, one per thread."""
    threads = max(1, min(torch.get_num_threads(), rows))
    edges = [rows * index // threads for index in range(threads + 1)]
    return share_out([slice(*pair) for pair in pairwise(edges)], [1.0] * threads, threads)


def _portions(
    share: list[slice], tensors: tuple[Tensor, ...], hidden_width: int, rooms: int
) -> Iterator[tuple[Any, ...]]:
    """The rows of a share in portions: a part of every tensor, and rooms ``[rows, H]`` for hidden values.

    Everything is cut out before the loop, as each small tensor operation in it would make the threads wait.
    """
    (rows,) = share
    step = max(1, HIDDEN_BYTES // (4 * hidden_width))
    parts = [tensor[rows].split(step) for tensor in tensors]
    room = tensors[0].new_empty(rooms, min(step, rows.stop - rows.start), hidden_width).unbind()
    last = tuple(each[: len(parts[0][-1])] for each in room)
    for number, part in enumerate(zip(*parts, strict=True), start=1):
        yield *part, (last if number == len(parts[0]) else room)
