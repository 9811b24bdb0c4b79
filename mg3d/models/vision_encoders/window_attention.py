"""Window attention that never holds the attention maps of a whole volume.

At the published size the first stage has 700 windows of 343 positions: one attention map of a single block takes about
1 GB, and automatic differentiation keeps several. Here the windows are worked off in chunks that fit the cache, and the
backward pass computes the maps again chunk by chunk, from the same numbers.

Shape suffixes: W windows (of the whole batch), P positions of one window, A heads, d channels of one head, C = A * d,
U different mask patterns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from monai.networks.nets.swin_unetr import WindowAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 2**30}
"""Size of the attention maps worked on at a time: about a CPU's cache; few kernel launches on a GPU."""


class WindowMask(NamedTuple):
    """Additive masks of shifted windows, each different pattern stored once.

    Attributes:
        patterns: ``[U, P, P]``, 0 or -100.
        pattern_of_window: ``[windows of one volume]``, index into ``patterns``.
    """

    patterns: Tensor
    pattern_of_window: Tensor


class ChunkedWindowAttention(WindowAttention):
    """MONAI's window attention, same parameters and results, computed in chunks of windows."""

    def forward(self, x: Tensor, mask: WindowMask | None) -> Tensor:
        """Attend inside every window.

        Args:
            x: ``[W, P, C]``, windows of one volume after the other.
            mask: masks of the shifted windows, or None.

        Returns:
            ``[W, P, C]``.
        """
        windows, positions, channels = x.shape
        qkv = self.qkv(x).view(windows, positions, 3, self.num_heads, channels // self.num_heads)
        # for clamped windows the published code reads the top-left block of the index of the full window
        index = self.get_buffer("relative_position_index")[:positions, :positions]
        bias_PPA = self.relative_position_bias_table[index]
        if mask is None:
            patterns, which = bias_PPA.new_zeros(1, positions, positions), index.new_zeros(windows)
        else:
            patterns, which = mask.patterns, mask.pattern_of_window.repeat(windows // len(mask.pattern_of_window))
        attended = _Attention.apply(qkv, bias_PPA.permute(2, 0, 1), patterns, which, self.scale)
        return self.proj(attended)


class _Attention(torch.autograd.Function):
    """softmax(scale * q k^T + bias + mask) v per window; keeps only q, k, v and the result for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, qkv_WP3Ad: Tensor, bias_APP: Tensor, patterns_UPP: Tensor, which_W: Tensor, scale: float
    ) -> Tensor:
        bias_UAPP = bias_APP.float() + patterns_UPP[:, None]
        windows, positions, _, heads, width = qkv_WP3Ad.shape
        result = qkv_WP3Ad.new_empty(windows, positions, heads, width)
        chunks = _chunks(qkv_WP3Ad)
        space = bias_UAPP.new_empty(len(which_W[chunks[0]]), *bias_UAPP.shape[1:])
        with torch.autocast(qkv_WP3Ad.device.type, enabled=False):
            for part in chunks:
                q, k, v = _split(qkv_WP3Ad[part])
                attention = _attention_map(q, k, bias_UAPP, which_W[part], scale, space)
                result[part] = torch.bmm(attention.to(v.dtype), v).view(-1, heads, positions, width).transpose(1, 2)
        ctx.save_for_backward(qkv_WP3Ad, bias_UAPP, which_W, result)
        ctx.scale, ctx.bias_dtype = scale, bias_APP.dtype
        return result.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_WPC: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias_UAPP, which_W, result = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        grad_bias = torch.zeros_like(bias_UAPP[0])
        heads, width = qkv.shape[3:]
        grad_WPAd = grad_WPC.unflatten(2, (heads, width))
        chunks = _chunks(qkv)
        space = bias_UAPP.new_empty(len(which_W[chunks[0]]), *bias_UAPP.shape[1:])
        with torch.autocast(qkv.device.type, enabled=False):
            for part in chunks:
                q, k, v = _split(qkv[part])
                attention = _attention_map(q, k, bias_UAPP, which_W[part], ctx.scale, space)
                grad = grad_WPAd[part].transpose(1, 2).flatten(0, 1).to(v.dtype)
                # derivative of softmax: a * (da - sum(a * da)); the sum equals grad . result
                product = (grad_WPAd[part] * result[part]).float().sum(-1).transpose(1, 2).flatten(0, 1)
                inner = torch.bmm(grad, v.transpose(1, 2)).float().sub_(product[..., None]).mul_(attention)
                inner_WAPP = inner.unflatten(0, (-1, heads))
                # summing a single window would write the map once more
                grad_bias += inner_WAPP[0] if len(inner_WAPP) == 1 else inner_WAPP.sum(0)
                inner = inner.to(q.dtype)
                # a view of the chunk that takes the gradients of q, k and v, each [W, A, P, d]
                target = grad_qkv[part].permute(2, 0, 3, 1, 4)
                target[0] = torch.bmm(inner, k).mul_(ctx.scale).view_as(target[0])
                target[1] = torch.bmm(inner.transpose(1, 2), q).mul_(ctx.scale).view_as(target[1])
                target[2] = torch.bmm(attention.to(v.dtype).transpose(1, 2), grad).view_as(target[2])
        return grad_qkv, grad_bias.to(ctx.bias_dtype), None, None, None


def _chunks(qkv_WP3Ad: Tensor) -> list[slice]:
    windows, positions, _, heads, _ = qkv_WP3Ad.shape
    budget = CHUNK_BYTES.get(qkv_WP3Ad.device.type, CHUNK_BYTES["cuda"])
    step = max(1, budget // (4 * heads * positions * positions))
    return [slice(start, start + step) for start in range(0, windows, step)]


def _split(qkv_WP3Ad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a chunk, each ``[W * A, P, d]``."""
    q, k, v = qkv_WP3Ad.permute(2, 0, 3, 1, 4).flatten(1, 2)
    return q, k, v


def _attention_map(
    q: Tensor, k: Tensor, bias_UAPP: Tensor, which_W: Tensor, scale: float, space_WAPP: Tensor
) -> Tensor:
    """Softmax weights ``[W * A, P, P]`` in float32, written to ``space``: memory that stays in the cache."""
    scores = torch.index_select(bias_UAPP, 0, which_W, out=space_WAPP[: len(which_W)]).flatten(0, 1)
    if q.dtype == scores.dtype:
        scores.baddbmm_(q, k.transpose(1, 2), alpha=scale)
    else:
        scores.add_(torch.bmm(q * scale, k.transpose(1, 2)))
    return torch.softmax(scores, dim=-1, out=scores)
