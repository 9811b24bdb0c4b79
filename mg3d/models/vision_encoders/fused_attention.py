"""The attention half of a Swin block on a CPU: ``x + proj(attention(qkv(norm(x))))``, little kept and copied.

As single layers this half writes the grid six times beside q, k and v. Here each core takes as many rows as fit its
cache through normalisation, reordering and projection at once, and the backward pass normalises them again from the
same numbers. Sums over the rows are taken in a fixed order.

Shape suffixes: B batch, D/H/W grid axes, N rows (all positions of all samples), C channels, A heads, d channels of one
head, P positions of one window, K keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mg3d.models.vision_encoders.attention_maps import AttentionGradient, attend, attend_backward
from mg3d.models.vision_encoders.compiled import WithoutInterpreterLock
from mg3d.models.vision_encoders.window_attention import GridWindowAttention
from mg3d.models.vision_encoders.windows import WindowGroup, window_groups, window_order
from mg3d.models.vision_encoders.worker_threads import in_full_precision, rows_in_cache, run_rows, sum_up


def can_fuse_attention(norm: nn.LayerNorm, attention: GridWindowAttention, x: Tensor) -> bool:
    """Whether :func:`attention_half` computes ``x + attention(norm(x))``: full precision on a CPU.

    Args:
        norm: LayerNorm over the last axis.
        attention: of the block.
        x: input.
    """
    return in_full_precision(norm, x) and attention.qkv.bias is not None


@torch.compiler.disable  # threads and compiled loops of its own
def attention_half(
    norm: nn.LayerNorm,
    attention: GridWindowAttention,
    grid_BDHWC: Tensor,
    window: tuple[int, int, int],
    shift: tuple[int, int, int],
) -> Tensor:
    """``x + attention(norm(x))``.

    Args:
        norm: LayerNorm over the channels.
        attention: its window attention.
        grid_BDHWC: ``[B, D, H, W, C]``, for which :func:`can_fuse_attention` holds.
        window: window edge per axis, not larger than the grid.
        shift: cyclic shift per axis.

    Returns:
        ``[B, D, H, W, C]``.
    """
    b, d, h, w, channels = grid_BDHWC.shape
    groups = window_groups((d, h, w), window, shift)
    order, back = window_order((b, d, h, w), window, shift, grid_BDHWC.device)
    layout = _Layout(order, back, groups, attention.num_heads, attention.scale, norm.eps)
    layers = attention.qkv, attention.proj
    weights = [norm.weight, norm.bias, *(part for layer in layers for part in (layer.weight, layer.bias))]
    biases = attention.position_biases(groups, grid_BDHWC.dtype)
    return _AttentionHalf.apply(grid_BDHWC.reshape(-1, channels), layout, *weights, *biases).view(grid_BDHWC.shape)


class _Layout(NamedTuple):
    """Where the rows go, and constants.

    Attributes:
        order: row of the grid at each place of the window order.
        back: its inverse.
        groups: windows that are alike.
        heads: A.
        scale: of the attention's products.
        eps: of the LayerNorm.
    """

    order: Tensor
    back: Tensor
    groups: tuple[WindowGroup, ...]
    heads: int
    scale: float
    eps: float

    def padding(self, qkv_bias: Tensor) -> Tensor:
        """Key and value ``[2, A, d]`` of a padded position: a zero vector through the projection."""
        return qkv_bias.view(3, self.heads, -1)[1:]


class _AttentionHalf(torch.autograd.Function):
    """Keeps its input, q, k, v and the result of the attention."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, layout: _Layout, *tensors: Tensor) -> Tensor:
        x_NC = x_NC.contiguous()
        gamma, beta, qkv_weight, qkv_bias, proj_weight, proj_bias, *biases = tensors
        qkv = _norm_project(x_NC, layout, gamma, beta, qkv_weight, qkv_bias).view(len(x_NC), 3, layout.heads, -1)
        attended = attend(qkv, layout.padding(qkv_bias), layout.groups, layout.scale, biases)
        result = _project_add(attended.flatten(1), x_NC, layout, proj_weight, proj_bias)
        ctx.save_for_backward(x_NC, qkv, attended, *tensors)
        ctx.layout = layout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, qkv, attended, *tensors = ctx.saved_tensors
        gamma, beta, qkv_weight, qkv_bias, proj_weight, _, *biases = tensors
        layout, grad_NC = ctx.layout, grad_NC.contiguous()
        grad_attended, *of_proj = _project_backward(grad_NC, attended.flatten(1), layout, proj_weight)
        grad_attended = grad_attended.view(attended.shape)
        padding = layout.padding(qkv_bias)
        found = attend_backward(grad_attended, attended, qkv, padding, layout.groups, layout.scale, biases)
        grad_x, *of_norm_qkv = _norm_project_backward(grad_NC, x_NC, found, layout, (gamma, beta, qkv_weight))
        return grad_x, None, *of_norm_qkv, *of_proj, *found.biases


def _norm_project(x_NC: Tensor, layout: _Layout, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm and linear layer, in window order."""
    result, step = x_NC.new_empty(len(x_NC), len(weight)), rows_in_cache(len(weight))

    def work(rows: slice) -> None:
        order, target = layout.order[rows], result[rows]
        _norm_project_rows(x_NC, order, target, gamma, beta, weight, bias, layout.eps, step)

    run_rows(work, len(x_NC))
    return result


@WithoutInterpreterLock
def _norm_project_rows(
    x_NC: Tensor,
    order: Tensor,
    target_N3C: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    step: int,
) -> None:
    for start in range(0, order.size(0), step):
        rows = x_NC.index_select(0, order[start : start + step])
        normed = torch.native_layer_norm(rows, [rows.size(1)], gamma, beta, eps)[0]
        torch.addmm(bias, normed, weight.t(), out=target_N3C[start : start + step])


def _project_add(attended_NC: Tensor, x_NC: Tensor, layout: _Layout, weight: Tensor, bias: Tensor) -> Tensor:
    """``x`` and the linear layer of what was attended, in the order of the grid."""
    result, step = torch.empty_like(x_NC), rows_in_cache(len(weight))

    def work(rows: slice) -> None:
        _project_add_rows(attended_NC, layout.back[rows], x_NC[rows], result[rows], weight, bias, step)

    run_rows(work, len(x_NC))
    return result


@WithoutInterpreterLock
def _project_add_rows(
    attended_NC: Tensor, back: Tensor, x_NC: Tensor, target_NC: Tensor, weight: Tensor, bias: Tensor, step: int
) -> None:
    for start in range(0, back.size(0), step):
        target = target_NC[start : start + step]
        torch.add(x_NC[start : start + step], bias, out=target)
        target.addmm_(attended_NC.index_select(0, back[start : start + step]), weight.t())


def _project_backward(grad_NC: Tensor, attended_NC: Tensor, layout: _Layout, weight: Tensor) -> list[Tensor]:
    """Gradients of what was attended, of the linear layer's weight and of its bias."""
    result, step = torch.empty_like(attended_NC), rows_in_cache(len(weight))

    def work(rows: slice) -> list[Tensor]:
        sums = [torch.zeros_like(weight), torch.zeros_like(weight[:, 0])]
        _project_backward_rows(grad_NC, layout.order[rows], attended_NC[rows], result[rows], weight, sums, step)
        return sums

    return [result, *sum_up(run_rows(work, len(grad_NC)))]


@WithoutInterpreterLock
def _project_backward_rows(
    grad_NC: Tensor,
    order: Tensor,
    attended_NC: Tensor,
    target_NC: Tensor,
    weight: Tensor,
    sums: list[Tensor],
    step: int,
) -> None:
    for start in range(0, order.size(0), step):
        grad = grad_NC.index_select(0, order[start : start + step])
        torch.mm(grad, weight, out=target_NC[start : start + step])
        sums[0].addmm_(grad.t(), attended_NC[start : start + step])
        sums[1].add_(grad.sum(0))


def _norm_project_backward(
    grad_NC: Tensor, x_NC: Tensor, found: AttentionGradient, layout: _Layout, weights: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """Gradients of the input (both ways to the result), of LayerNorm's weights, of q, k, v's weight and bias."""
    grad_x, grad_qkv, step = torch.empty_like(x_NC), found.qkv.view(len(x_NC), -1), rows_in_cache(len(weights[2]))

    def work(rows: slice) -> list[Tensor]:
        sums = [torch.zeros_like(part) for part in (*weights, weights[2][:, 0])]
        of_x = x_NC[rows], grad_NC[rows], grad_x[rows]
        _norm_project_backward_rows(grad_qkv, layout.back[rows], *of_x, *weights, sums, layout.eps, step)
        return sums

    sums = sum_up(run_rows(work, len(x_NC)))
    layout.padding(sums[3]).add_(found.padding)
    return [grad_x, *sums]


@WithoutInterpreterLock
def _norm_project_backward_rows(
    grad_N3C: Tensor,
    back: Tensor,
    x_NC: Tensor,
    grad_NC: Tensor,
    target_NC: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    sums: list[Tensor],
    eps: float,
    step: int,
) -> None:
    for start in range(0, back.size(0), step):
        rows = x_NC[start : start + step]
        grad = grad_N3C.index_select(0, back[start : start + step])
        normed, mean, rstd = torch.native_layer_norm(rows, [rows.size(1)], gamma, beta, eps)
        sums[2].addmm_(grad.t(), normed)
        sums[3].add_(grad.sum(0))
        through, of_gamma, of_beta = torch.ops.aten.native_layer_norm_backward(
            torch.mm(grad, weight), rows, [rows.size(1)], mean, rstd, gamma, beta, [True, True, True]
        )
        torch.add(through, grad_NC[start : start + step], out=target_NC[start : start + step])
        sums[0].add_(of_gamma)
        sums[1].add_(of_beta)
