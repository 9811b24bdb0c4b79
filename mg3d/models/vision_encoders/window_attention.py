"""Window attention on the unpadded grid, a few attention maps at a time.

At the published size one block of the first stage has 2,100 maps of 343 x 343: about 1 GB, of which automatic
differentiation keeps several copies. Here each core works on two maps at a time, which stay in its cache, and the
backward pass computes them again from the same numbers; windows are cut to the positions that exist
(:mod:`mg3d.models.vision_encoders.windows`).

Shape suffixes: B batch, D/H/W grid axes, M windows, P positions of one window, K keys (P, or P + 1 with the padding),
A heads, d channels of one head, C = A * d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from monai.networks.nets.swin_unetr import WindowAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

from mg3d.models.vision_encoders.windows import WindowGroup, window_groups
from mg3d.models.vision_encoders.worker_threads import run_shares, share_out

CUDA_MAP_BYTES = 2**30
"""Attention maps worked on at a time on a GPU: few kernel launches."""
CPU_MAP_BYTES = 2**20
"""The same for each core of a CPU: about its own cache."""
CPU_GATHER_BYTES = 2**23
"""Queries, keys and values copied out of the grid at a time on a CPU, where one layer of windows is smaller."""


class GridWindowAttention(WindowAttention):
    """MONAI's window attention, same parameters and results, applied to a grid instead of to padded windows."""

    def forward(  # type: ignore[override]
        self, grid_BDHWC: Tensor, window: tuple[int, int, int], shift: tuple[int, int, int]
    ) -> Tensor:
        """Attend inside every window.

        Args:
            grid_BDHWC: ``[B, D, H, W, C]``.
            window: window edge per axis, not larger than the grid.
            shift: cyclic shift per axis.

        Returns:
            ``[B, D, H, W, C]``.
        """
        b, d, h, w, channels = grid_BDHWC.shape
        qkv = self.qkv(grid_BDHWC).view(b, d, h, w, 3, self.num_heads, channels // self.num_heads)
        positions = window[0] * window[1] * window[2]
        # for clamped windows the published code reads the top-left block of the index of the full window
        index = self.get_buffer("relative_position_index")[:positions, :positions]
        bias_APP = self.relative_position_bias_table[index].permute(2, 0, 1).to(_map_dtype(qkv.dtype))
        groups = window_groups((d, h, w), window, shift)
        biases = [group.bias(bias_APP).contiguous() for group in groups]
        attended = _Attention.apply(qkv, self._padding_key_value(qkv), groups, self.scale, *biases)
        return self.proj(attended)

    def _padding_key_value(self, qkv: Tensor) -> Tensor:
        """Key and value ``[2, A, d]`` of a padded position: a zero vector through the projection."""
        if self.qkv.bias is None:
            return qkv.new_zeros(2, *qkv.shape[-2:])
        return self.qkv.bias.view(3, *qkv.shape[-2:])[1:].to(qkv.dtype)


class _Attention(torch.autograd.Function):
    """softmax(scale * q k^T + bias) v per window; keeps only q, k, v and the result for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, padding_2Ad: Tensor, groups: Sequence[WindowGroup], scale: float, *biases: Tensor
    ) -> Tensor:
        result = qkv.new_empty(*qkv.shape[:4], *qkv.shape[5:])

        def work(pieces: list[Piece]) -> None:
            for index, place in pieces:
                q, k, v = _operands(qkv, padding_2Ad, groups[index], place)
                out = torch.empty_like(q)
                for part, maps in _chunks(biases[index], q):
                    attention = _attention(q[part], k[part], biases[index][part[0]], scale, maps)
                    torch.bmm(attention.to(v.dtype), v[part].flatten(0, 1), out=out[part].flatten(0, 1))
                _scatter(out, groups[index], result, place)

        with torch.autocast(qkv.device.type, enabled=False):
            run_shares(work, _pieces(qkv, groups))
        ctx.save_for_backward(qkv, padding_2Ad, result, *biases)
        ctx.groups, ctx.scale = groups, scale
        return result.flatten(4)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDHWC: Tensor) -> tuple[Tensor | None, ...]:
        qkv, padding_2Ad, result, *biases = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        grad_result = grad_BDHWC.unflatten(4, qkv.shape[5:]).to(qkv.dtype)
        # derivative of softmax: a * (da - sum(a * da)); the sum equals grad . result
        inner_BDHWA1 = (grad_result * result).sum(-1, keepdim=True, dtype=biases[0].dtype)

        def work(pieces: list[Piece]) -> tuple[Tensor, dict[int, Tensor]]:
            grad_padding = torch.zeros_like(padding_2Ad, dtype=biases[0].dtype)
            grad_biases = {index: torch.zeros_like(biases[index]) for index in {index for index, _ in pieces}}
            for index, place in pieces:
                group = ctx.groups[index]
                operands = _operands(qkv, padding_2Ad, group, place)
                grad, inner = _gather(grad_result, group, place), _gather(inner_BDHWA1, group, place)
                grads = _backward_windows(operands, grad, inner, biases[index], grad_biases[index], ctx.scale)
                _scatter_qkv(grads, group, grad_qkv, grad_padding, place)
            return grad_padding, grad_biases

        with torch.autocast(qkv.device.type, enabled=False):
            found = run_shares(work, _pieces(qkv, ctx.groups))
        grad_padding = torch.stack([padding for padding, _ in found]).sum(0).to(padding_2Ad.dtype)
        of_bias = [[part[index] for _, part in found if index in part] for index in range(len(biases))]
        grad_biases = [parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in of_bias]
        return grad_qkv, grad_padding, None, None, *grad_biases


def _backward_windows(
    qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor, inner: Tensor, bias: Tensor, grad_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of some windows, each ``[A, M, ., d]``; those of the bias are added to ``grad_bias``."""
    q, k, v = qkv
    grad_q, grad_k, grad_v = (torch.empty_like(each) for each in qkv)
    other = None
    for part, maps in _chunks(bias, q):
        attention = _attention(q[part], k[part], bias[part[0]], scale, maps)
        other = torch.empty_like(maps) if other is None or len(other) < len(maps) else other
        q_, k_, v_, grad_ = (each[part].flatten(0, 1) for each in (q, k, v, grad))
        torch.bmm(attention.to(grad_.dtype).transpose(1, 2), grad_, out=grad_v[part].flatten(0, 1))
        slope = _product(grad_, v_, other[: len(maps)]).sub_(inner[part].flatten(0, 1)).mul_(attention)
        grad_bias[part[0]] += slope.unflatten(0, inner[part].shape[:2]).sum(1) if len(slope) > 1 else slope
        slope = slope.to(q.dtype)
        torch.bmm(slope, k_, out=grad_q[part].flatten(0, 1))
        torch.bmm(slope.transpose(1, 2), q_, out=grad_k[part].flatten(0, 1))
    return grad_q.mul_(scale), grad_k.mul_(scale), grad_v


def _map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Number type of attention maps: single precision for the half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _product(a_MPd: Tensor, b_MKd: Tensor, out_MPK: Tensor) -> Tensor:
    """``a b^T`` written to ``out``."""
    if a_MPd.dtype == out_MPK.dtype:
        return torch.bmm(a_MPd, b_MKd.transpose(1, 2), out=out_MPK)
    return out_MPK.copy_(torch.bmm(a_MPd, b_MKd.transpose(1, 2)))


def _attention(q_AMPd: Tensor, k_AMKd: Tensor, bias_APK: Tensor, scale: float, maps: Tensor) -> Tensor:
    """Softmax weights ``[A * M, P, K]`` written to ``maps``: memory that stays in the cache."""
    q, k = q_AMPd.flatten(0, 1), k_AMKd.flatten(0, 1).transpose(1, 2)
    maps.unflatten(0, q_AMPd.shape[:2]).copy_(bias_APK[:, None])
    if q.dtype == maps.dtype:
        maps.baddbmm_(q, k, alpha=scale)
    else:
        maps.add_(torch.bmm(q * scale, k))
    return torch.softmax(maps, dim=-1, out=maps)


Part = tuple[slice, slice]


def _chunks(bias_APK: Tensor, q_AMPd: Tensor) -> Iterator[tuple[Part, Tensor]]:
    """Heads and windows, in portions whose maps fit the cache, and room ``[A * M, P, K]`` for them."""
    heads, windows = q_AMPd.shape[:2]
    on_cpu = bias_APK.device.type == "cpu"
    fitting = max(1, (CPU_MAP_BYTES if on_cpu else CUDA_MAP_BYTES) // (bias_APK[0].numel() * bias_APK.element_size()))
    # several heads only with all windows: their parts of the operands are then contiguous
    head_step, step = (min(heads, fitting // windows), windows) if fitting >= windows else (1, fitting)
    room = bias_APK.new_empty(head_step * step, *bias_APK.shape[1:])
    for head in range(0, heads, head_step):
        for start in range(0, windows, step):
            part = slice(head, min(head + head_step, heads)), slice(start, min(start + step, windows))
            yield part, room[: (part[0].stop - head) * (part[1].stop - start)]


Place = tuple[slice, slice]
Piece = tuple[int, Place]


def _pieces(qkv: Tensor, groups: Sequence[WindowGroup]) -> list[list[Piece]]:
    """Window groups and their places, shared out to the threads of a CPU."""
    threads = torch.get_num_threads() if qkv.device.type == "cpu" else 1
    pieces, costs = [], []
    for index, group in enumerate(groups):
        places = _places(qkv, group, whole_bytes=CPU_GATHER_BYTES if threads == 1 else CPU_GATHER_BYTES // 16)
        cost = len(qkv) * prod(run.count for run in group.runs) * len(group.positions) ** 2 / len(places)
        pieces += [(index, place) for place in places]
        costs += [cost] * len(places)
    return share_out(pieces, costs, threads)


def _places(qkv: Tensor, group: WindowGroup, whole_bytes: int) -> list[Place]:
    """Samples and layers of windows whose operands are gathered at a time; all of them when they are few."""
    samples, layers = len(qkv), group.runs[0].count
    layer_bytes = group.windows(qkv)[0, 0].numel() * qkv.element_size()
    if qkv.device.type != "cpu" or samples * layers * layer_bytes <= whole_bytes:
        return [(slice(None), slice(None))]
    return [(slice(b, b + 1), slice(n, n + 1)) for b in range(samples) for n in range(layers)]


def _operands(qkv: Tensor, padding_2Ad: Tensor, group: WindowGroup, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[A, M, P, d]``, keys and values ``[A, M, K, d]`` of the windows at a place."""
    q, k, v = (_gather(qkv[..., which, :, :], group, place) for which in range(3))
    if not group.padding:
        return q, k, v
    extra_k, extra_v = (each[:, None, None].expand(-1, k.shape[1], 1, -1) for each in padding_2Ad)
    return q, torch.cat([k, extra_k], dim=2), torch.cat([v, extra_v], dim=2)


def _gather(grid_BDHWAd: Tensor, group: WindowGroup, place: Place) -> Tensor:
    """Windows at a place as contiguous ``[A, M, P, d]``."""
    view = group.windows(grid_BDHWAd)[place]
    heads, width = view.shape[-2:]
    return view.movedim(-2, 0).reshape(heads, -1, len(group.positions), width).contiguous()


def _scatter(part_AMPd: Tensor, group: WindowGroup, grid_BDHWAd: Tensor, place: Place) -> None:
    """Write windows back to their place; the inverse of :func:`_gather`."""
    view = group.windows(grid_BDHWAd)[place].movedim(-2, 0)
    view.copy_(part_AMPd.view(view.shape))


def _scatter_qkv(
    grads: tuple[Tensor, Tensor, Tensor], group: WindowGroup, grad_qkv: Tensor, grad_padding: Tensor, place: Place
) -> None:
    count = len(group.positions)
    for which, grad in enumerate(grads):
        _scatter(grad[:, :, :count].contiguous(), group, grad_qkv[..., which, :, :], place)
        if which and group.padding:
            grad_padding[which - 1] += grad[:, :, count].sum(1, dtype=grad_padding.dtype)
