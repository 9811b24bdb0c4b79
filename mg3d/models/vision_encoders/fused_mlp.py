"""The MLP half of a Swin block on a CPU, ``x + mlp(norm(x))``, some rows at a time, keeping little for the gradient.

The hidden layer is four times as wide as the grid and is needed twice (before and after GELU): 300 MB in one block of
the first stage at the published size. Here each core takes as many rows as fit its cache through both layers, and the
backward pass computes the hidden layer again from the same numbers. Sums over the rows are taken in a fixed order.

Shape suffixes: N rows (all grid positions), C channels, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mg3d.models.vision_encoders.compiled import WithoutInterpreterLock
from mg3d.models.vision_encoders.worker_threads import in_full_precision, rows_in_cache, run_rows, sum_up


def can_fuse_mlp(norm: nn.LayerNorm, mlp: nn.Module, x: Tensor) -> bool:
    """Whether :func:`mlp_half` computes ``x + mlp(norm(x))``: full precision on a CPU, without dropout.

    Args:
        norm: LayerNorm over the last axis.
        mlp: MONAI's ``MLPBlock`` with GELU.
        x: input.
    """
    if not in_full_precision(norm, x):
        return False
    dropping = mlp.training and any(part.p > 0 for part in mlp.modules() if isinstance(part, nn.Dropout))
    plain = isinstance(mlp.fn, nn.GELU) and mlp.fn.approximate == "none"
    return plain and not dropping


@torch.compiler.disable  # threads and compiled loops of its own
def mlp_half(norm: nn.LayerNorm, mlp: nn.Module, x: Tensor) -> Tensor:
    """``x + linear2(gelu(linear1(norm(x))))``.

    Args:
        norm: LayerNorm over the last axis.
        mlp: has ``linear1`` and ``linear2``.
        x: ``[..., C]``, for which :func:`can_fuse_mlp` holds.

    Returns:
        The same shape.
    """
    layers: tuple[Any, Any] = mlp.linear1, mlp.linear2
    first, second = layers
    weights = norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias
    return _MLPHalf.apply(x.flatten(0, -2), norm.eps, *weights).view(x.shape)


class _MLPHalf(torch.autograd.Function):
    """Keeps only its input."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, eps: float, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_NC, *weights)
        ctx.eps = eps
        x_NC = x_NC.contiguous()
        result, step = torch.empty_like(x_NC), rows_in_cache(len(weights[2]))

        def work(rows: slice) -> None:
            _forward_rows(x_NC[rows], result[rows], list(weights), eps, step)

        run_rows(work, len(x_NC))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, *weights = ctx.saved_tensors
        x_NC, grad_NC = x_NC.contiguous(), grad_NC.contiguous()
        grad_x, step = torch.empty_like(x_NC), rows_in_cache(len(weights[2]))

        def work(rows: slice) -> list[Tensor]:
            sums = [torch.zeros_like(weight) for weight in weights]
            _backward_rows(x_NC[rows], grad_NC[rows], grad_x[rows], weights, sums, ctx.eps, step)
            return sums

        return grad_x, None, *sum_up(run_rows(work, len(x_NC)))


@WithoutInterpreterLock
def _forward_rows(x_NC: Tensor, result_NC: Tensor, weights: list[Tensor], eps: float, step: int) -> None:
    """Write the result of some rows, ``step`` at a time."""
    gamma, beta, w1_HC, b1, w2_CH, b2 = weights[0], weights[1], weights[2], weights[3], weights[4], weights[5]
    room = x_NC.new_empty([min(step, x_NC.size(0)), w1_HC.size(0)])
    for start in range(0, x_NC.size(0), step):
        x, target = x_NC[start : start + step], result_NC[start : start + step]
        hidden = room[: x.size(0)]
        normed = torch.native_layer_norm(x, [x.size(1)], gamma, beta, eps)[0]
        torch.addmm(b1, normed, w1_HC.t(), out=hidden)
        torch.ops.aten.gelu_(hidden)
        torch.add(x, b2, out=target)
        target.addmm_(hidden, w2_CH.t())


@WithoutInterpreterLock
def _backward_rows(
    x_NC: Tensor,
    grad_NC: Tensor,
    target_NC: Tensor,
    weights: list[Tensor],
    sums: list[Tensor],
    eps: float,
    step: int,
) -> None:
    """Write the gradient of some rows; what they add to the weights' gradients is added to ``sums``."""
    gamma, beta, w1_HC, b1, w2_CH = weights[0], weights[1], weights[2], weights[3], weights[4]
    rooms = x_NC.new_empty([3, min(step, x_NC.size(0)), w1_HC.size(0)])
    for start in range(0, x_NC.size(0), step):
        x, grad = x_NC[start : start + step], grad_NC[start : start + step]
        hidden, activated, grad_hidden = rooms[0, : x.size(0)], rooms[1, : x.size(0)], rooms[2, : x.size(0)]
        normed, mean, rstd = torch.native_layer_norm(x, [x.size(1)], gamma, beta, eps)
        torch.addmm(b1, normed, w1_HC.t(), out=hidden)
        torch.ops.aten.gelu(hidden, out=activated)
        sums[4].addmm_(grad.t(), activated)
        sums[5].add_(grad.sum(0))
        torch.mm(grad, w2_CH, out=grad_hidden)
        torch.ops.aten.gelu_backward(grad_hidden, hidden, grad_input=grad_hidden)
        sums[2].addmm_(grad_hidden.t(), normed)
        sums[3].add_(grad_hidden.sum(0))
        through, of_gamma, of_beta = torch.ops.aten.native_layer_norm_backward(
            torch.mm(grad_hidden, w1_HC), x, [x.size(1)], mean, rstd, gamma, beta, [True, True, True]
        )
        torch.add(through, grad, out=target_NC[start : start + step])
        sums[0].add_(of_gamma)
        sums[1].add_(of_beta)
