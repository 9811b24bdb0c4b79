"""Window attention on the unpadded grid, a few attention maps at a time.

At the published size one block of the first stage has 2,100 maps of 343 x 343: about 1 GB, of which automatic
differentiation keeps several copies. Here the grid is put into the order of its windows once, each core works on a few
maps at a time, which stay in its cache, and the backward pass computes them again from the same numbers; windows are
cut to the positions that exist (:mod:`mg3d.models.vision_encoders.windows`).

Shape suffixes: B batch, D/H/W grid axes, N rows in window order (all positions of all samples), M windows, P positions
of one window, K keys (P, or P + 1 with the padding), A heads, d channels of one head, C = A * d.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from monai.networks.nets.swin_unetr import WindowAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

from mg3d.models.vision_encoders.windows import WindowGroup, window_groups, window_order
from mg3d.models.vision_encoders.worker_threads import run_shares, share_out

CUDA_MAP_BYTES = 2**30
"""Attention maps worked on at a time on a GPU: few kernel launches."""
CPU_MAP_BYTES = 2**21
"""The same for each core of a CPU: a few maps, near its own cache."""


class GridWindowAttention(WindowAttention):
    """MONAI's window attention, same parameters and results, applied to a grid instead of to padded windows.

    Args:
        *args: of MONAI's attention.
        **options: of MONAI's attention.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rows: dict[tuple[tuple[WindowGroup, ...], torch.device], Tensor] = {}

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
        order, back = window_order((b, d, h, w), window, shift, grid_BDHWC.device)
        rows_NC = _Reorder.apply(grid_BDHWC.reshape(-1, channels), order, back)
        qkv = self.qkv(rows_NC).view(-1, 3, self.num_heads, channels // self.num_heads)
        groups = window_groups((d, h, w), window, shift)
        biases = self._biases(groups, _map_dtype(qkv.dtype))
        attended_NC = _Attention.apply(qkv, self._padding_key_value(qkv), groups, self.scale, *biases)
        return _Reorder.apply(self.proj(attended_NC), back, order).view(grid_BDHWC.shape)

    def _biases(self, groups: tuple[WindowGroup, ...], dtype: torch.dtype) -> list[Tensor]:
        """Relative position bias ``[A, P, K]`` of every group, looked up for all groups at once.

        The last key, where there is padding, joins the padded positions: log of the sum of their exponentials.
        """
        table_RA = self.relative_position_bias_table.to(dtype)
        sizes = [len(group.positions) * len(keys) for group in groups for keys in (group.positions, group.padding)]
        parts = iter(_LookUp.apply(table_RA, self._bias_rows(groups)).split(sizes, dim=1))
        biases = []
        for group in groups:
            shape = self.num_heads, len(group.positions), -1
            bias_APK, padded_AT = next(parts).reshape(shape), next(parts)
            if group.padding:
                bias_APK = torch.cat([bias_APK, padded_AT.reshape(shape).logsumexp(2, keepdim=True)], dim=2)
            biases.append(bias_APK.contiguous())
        return biases

    def _bias_rows(self, groups: tuple[WindowGroup, ...]) -> Tensor:
        """Rows of the bias table for every query with every key, then every padded position, group by group."""
        # for clamped windows the published code reads the top-left block of the index of the full window
        index_PP = self.get_buffer("relative_position_index")
        key = groups, index_PP.device
        if key not in self._rows:
            with torch.inference_mode(False):  # kept for later calls, of training too
                parts = [
                    index_PP[list(group.positions)][:, list(keys)].flatten()
                    for group in groups
                    for keys in (group.positions, group.padding)
                ]
                self._rows[key] = torch.cat(parts).long()
        return self._rows[key]

    def _padding_key_value(self, qkv: Tensor) -> Tensor:
        """Key and value ``[2, A, d]`` of a padded position: a zero vector through the projection."""
        if self.qkv.bias is None:
            return qkv.new_zeros(2, *qkv.shape[-2:])
        return self.qkv.bias.view(3, *qkv.shape[-2:])[1:].to(qkv.dtype)


class _Reorder(torch.autograd.Function):
    """``rows[order]`` for a permutation; its gradient is a copy in the order back instead of a sum."""

    @staticmethod
    def forward(ctx: Any, rows_NC: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows_NC.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None, None]:
        return grad_NC.contiguous().index_select(0, ctx.back), None, None


class _LookUp(torch.autograd.Function):
    """``table[rows].t()``; on a CPU its gradient is a weighted count of the rows, many times as fast as adding up."""

    @staticmethod
    def forward(ctx: Any, table_RA: Tensor, rows_T: Tensor) -> Tensor:
        ctx.rows, ctx.length = rows_T, len(table_RA)
        return table_RA.t().contiguous().index_select(1, rows_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AT: Tensor) -> tuple[Tensor, None]:
        if grad_AT.device.type == "cpu":
            counts = [torch.bincount(ctx.rows, grad_T, ctx.length) for grad_T in grad_AT]
            return torch.stack(counts, dim=1).to(grad_AT.dtype), None
        return grad_AT.new_zeros(ctx.length, len(grad_AT)).index_add_(0, ctx.rows, grad_AT.t()), None


class _Attention(torch.autograd.Function):
    """softmax(scale * q k^T + bias) v per window; keeps only q, k, v and the result for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, qkv_N3Ad: Tensor, padding_2Ad: Tensor, groups: Sequence[WindowGroup], scale: float, *biases: Tensor
    ) -> Tensor:
        result = torch.empty_like(qkv_N3Ad[:, 0])

        def work(pieces: list[_Piece]) -> None:
            for piece in pieces:
                plan = _plan(biases[piece.group], piece.windows)
                q, k, v = _operands(piece, qkv_N3Ad, padding_2Ad)
                targets = plan.cut(piece.block(result), flat=False)
                outs = plan.rooms(q.new_empty(len(plan.maps), q.shape[1], q.shape[3]), targets)
                halves = plan.rooms(plan.maps.to(q.dtype))
                cuts = plan.cut(q), plan.cut(k, turned=True), plan.cut(v)
                for portion, q_, k_, v_, target, (out, shaped), half in zip(
                    plan.portions, *cuts, targets, outs, halves, strict=True
                ):
                    _attention(portion, q_, k_, scale)
                    torch.bmm(_as(portion.maps, half), v_, out=out)
                    target.copy_(shaped)

        with torch.autocast(qkv_N3Ad.device.type, enabled=False):
            run_shares(work, _pieces(qkv_N3Ad, groups))
        ctx.save_for_backward(qkv_N3Ad, padding_2Ad, result, *biases)
        ctx.groups, ctx.scale = groups, scale
        return result.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        qkv, padding_2Ad, result, *biases = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        grad_result = grad_NC.contiguous().view(result.shape).to(qkv.dtype)

        def work(pieces: list[_Piece]) -> tuple[Tensor, dict[int, Tensor]]:
            grad_padding = torch.zeros_like(padding_2Ad, dtype=biases[0].dtype)
            grad_biases = {index: torch.zeros_like(biases[index]) for index in {piece.group for piece in pieces}}
            for piece in pieces:
                operands = _operands(piece, qkv, padding_2Ad)
                of_result = piece.block(grad_result), piece.block(result)
                grads = _gradient_room(piece, grad_qkv)
                bias, grad_bias = biases[piece.group], grad_biases[piece.group]
                _backward_windows(operands, of_result, grads, bias, grad_bias, ctx.scale)
                _keep_padded(piece, grads, grad_qkv, grad_padding)
            return grad_padding, grad_biases

        with torch.autocast(qkv.device.type, enabled=False):
            found = run_shares(work, _pieces(qkv, ctx.groups))
        grad_padding = torch.stack([padding for padding, _ in found]).sum(0).to(padding_2Ad.dtype)
        of_bias = [[part[index] for _, part in found if index in part] for index in range(len(biases))]
        grad_biases = [parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in of_bias]
        return grad_qkv, grad_padding, None, None, *grad_biases


Blocks = tuple[Tensor, Tensor, Tensor]


def _backward_windows(
    qkv: Blocks, of_result: tuple[Tensor, Tensor], grads: Blocks, bias: Tensor, grad_bias: Tensor, scale: float
) -> None:
    """Write the gradients of q, k and v ``[M, ., A, d]`` of some windows; those of the bias are added to its own."""
    grad_MPAd, result_MPAd = of_result
    # derivative of softmax: a * (da - sum(a * da)); the sum equals grad . result
    inner_MPA1 = (grad_MPAd * result_MPAd).sum(-1, keepdim=True, dtype=bias.dtype).neg_()
    plan = _plan(bias, len(grad_MPAd))
    # memory of its own for every intermediate: what comes from the allocator is seldom in this core's cache
    halves = plan.rooms(plan.maps.to(grad_MPAd.dtype))
    others = plan.rooms(torch.empty_like(plan.maps))
    of_bias = bias.new_empty(plan.heads, *bias.shape[1:])
    to_bias = [(grad_bias[portion.heads], of_bias[: len(grad_bias[portion.heads])]) for portion in plan.portions]
    by_head = [
        other.view(-1, portion.windows, *other.shape[1:]) for portion, other in zip(plan.portions, others, strict=True)
    ]
    q, k, v = qkv
    cuts = [plan.cut(q), plan.cut(k), plan.cut(k, turned=True), plan.cut(v, turned=True)]
    cuts += [plan.cut(grad_MPAd), plan.cut(inner_MPA1)]
    targets = [plan.cut(each, flat=False) for each in grads]
    outs = [
        plan.rooms(each.new_empty(len(plan.maps), each.shape[1], each.shape[3]), target)
        for each, target in zip(qkv, targets, strict=True)
    ]
    loop = zip(plan.portions, halves, others, by_head, to_bias, *cuts, *targets, *outs, strict=True)
    for portion, half, other, heads, (to_b, out_b), q_, k_, k_T, v_T, grad, inner, to_q, to_k, to_v, *out in loop:
        attention = _attention(portion, q_, k_T, scale)
        torch.bmm(_as(attention, half).mT, grad, out=out[2][0])
        to_v.copy_(out[2][1])
        slope = _sum_of_products(inner, grad, v_T, 1.0, other).mul_(attention)
        to_b.add_(torch.sum(heads, 1, out=out_b))
        slope = _as(slope, half)
        torch.bmm(slope, k_, out=out[0][0])
        torch.mul(out[0][1], scale, out=to_q)
        torch.bmm(slope.mT, q_, out=out[1][0])
        torch.mul(out[1][1], scale, out=to_k)


def _as(maps: Tensor, room: Tensor) -> Tensor:
    """``maps`` in the number type of ``room``, copied there where it is another one."""
    return maps if maps.dtype == room.dtype else room.copy_(maps)


def _map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Number type of attention maps: single precision for the half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _sum_of_products(start: Tensor, a_MPd: Tensor, b_MdK: Tensor, scale: float, out_MPK: Tensor) -> Tensor:
    """``start + scale * a b`` written to ``out``: memory that stays in the cache."""
    if a_MPd.dtype == out_MPK.dtype:
        return torch.baddbmm(start, a_MPd, b_MdK, alpha=scale, out=out_MPK)
    return torch.add(start, torch.bmm(a_MPd * scale, b_MdK), out=out_MPK)


class _Portion(NamedTuple):
    """Attention maps worked on at a time: some windows of one head, or all windows of several heads.

    Attributes:
        heads: which heads.
        windows: number of windows of each.
        bias: ``[P, K]`` of the one head, or ``[A, 1, P, K]``.
        maps: room for the maps, ``[A * M, P, K]``.
    """

    heads: slice
    windows: int
    bias: Tensor
    maps: Tensor


class _Plan(NamedTuple):
    """How the maps of some windows are worked through.

    Everything that the loop over the portions needs is cut out before it, with few operations: each small tensor
    operation in the loop would make the threads wait for each other.

    Attributes:
        portions: in the order of the loop.
        heads: at a time.
        windows: at a time.
    """

    portions: list[_Portion]
    heads: int
    windows: int

    @property
    def maps(self) -> Tensor:
        """Room of the first portion, which is the largest."""
        return self.portions[0].maps

    def cut(self, block_MPAd: Tensor, flat: bool = True, turned: bool = False) -> list[Tensor]:
        """Parts of the portions: ``[A * M, P, d]``, or views ``[A, M, P, d]`` to write to where not ``flat``.

        Args:
            block_MPAd: of all heads and windows.
            flat: one axis for heads and windows.
            turned: with the last two axes exchanged.
        """
        if self.heads == 1:
            heads = (head.mT if turned else head for head in block_MPAd.unbind(2))
            return [part for head in heads for part in head.split(self.windows)]
        parts = block_MPAd.permute(2, 0, 1, 3).split(self.heads)
        parts = [part.flatten(0, 1) for part in parts] if flat else list(parts)
        return [part.mT for part in parts] if turned else parts

    def rooms(self, room: Tensor, targets: list[Tensor] | None = None) -> list[Any]:
        """As much of ``room`` as each portion needs; with ``targets`` also in their shapes."""
        found = {len(portion.maps): room[: len(portion.maps)] for portion in self.portions}
        cut = [found[len(portion.maps)] for portion in self.portions]
        if targets is None:
            return cut
        return [(part, part.view(target.shape)) for part, target in zip(cut, targets, strict=True)]


def _plan(bias_APK: Tensor, windows: int) -> _Plan:
    """Portions whose maps fit the cache; one head at a time unless several fit with all their windows."""
    heads = len(bias_APK)
    room_bytes = CPU_MAP_BYTES if bias_APK.device.type == "cpu" else CUDA_MAP_BYTES
    fitting = max(1, room_bytes // (bias_APK[0].numel() * bias_APK.element_size()))
    heads_step, step = min(heads, max(1, fitting // windows)), min(windows, fitting)
    room = bias_APK.new_empty(heads_step * step, *bias_APK.shape[1:])
    portions = []
    for start in range(0, heads, heads_step):
        part = slice(start, min(start + heads_step, heads))
        bias = bias_APK[start] if heads_step == 1 else bias_APK[part, None]
        for first in range(0, windows, step):
            count = min(step, windows - first)
            portions.append(_Portion(part, count, bias, room[: (part.stop - part.start) * count]))
    return _Plan(portions, heads_step, step)


def _attention(portion: _Portion, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax weights ``[A * M, P, K]`` written to the room of the portion."""
    maps, start = portion.maps, portion.bias
    if start.ndim == 4:
        maps.view(len(start), -1, *maps.shape[1:]).copy_(start)
        start = maps
    return torch.softmax(_sum_of_products(start, q, k, scale, maps), dim=-1, out=maps)


class _Piece(NamedTuple):
    """Some windows of one group: a block of consecutive rows.

    Attributes:
        group: index of the group.
        rows: of the block.
        windows: M of the block.
        padded: whether the windows see padded positions, as one more key.
    """

    group: int
    rows: slice
    windows: int
    padded: bool

    def block(self, rows_N: Tensor) -> Tensor:
        """View of the block as ``[M, P, ...]``."""
        return rows_N[self.rows].unflatten(0, (self.windows, -1))


def _pieces(qkv_N3Ad: Tensor, groups: Sequence[WindowGroup]) -> list[list[_Piece]]:
    """The windows of all groups, shared out to the threads of a CPU."""
    threads = torch.get_num_threads() if qkv_N3Ad.device.type == "cpu" else 1
    samples = len(qkv_N3Ad) // sum(group.rows for group in groups)
    pieces, costs, first = [], [], 0
    for index, group in enumerate(groups):
        positions, windows = len(group.positions), samples * group.rows // len(group.positions)
        edges = [windows * part // threads for part in range(threads + 1)]
        for start, stop in pairwise(edges):
            if stop > start:
                rows = slice(first + start * positions, first + stop * positions)
                pieces.append(_Piece(index, rows, stop - start, bool(group.padding)))
                costs.append(float(stop - start) * positions**2)
        first += samples * group.rows
    return share_out(pieces, costs, threads)


def _operands(piece: _Piece, qkv_N3Ad: Tensor, padding_2Ad: Tensor) -> Blocks:
    """Queries ``[M, P, A, d]``, keys and values ``[M, K, A, d]`` of a piece."""
    q, k, v = piece.block(qkv_N3Ad).unbind(2)
    if not piece.padded:
        return q, k, v
    extra_k, extra_v = (each.expand(len(q), 1, -1, -1) for each in padding_2Ad)
    return q, torch.cat([k, extra_k], dim=1), torch.cat([v, extra_v], dim=1)


def _gradient_room(piece: _Piece, grad_qkv: Tensor) -> Blocks:
    """Where the gradients of q, k and v of a piece go: their place, or with padding new memory for k and v."""
    grad_q, grad_k, grad_v = piece.block(grad_qkv).unbind(2)
    if not piece.padded:
        return grad_q, grad_k, grad_v
    shape = len(grad_k), grad_k.shape[1] + 1, *grad_k.shape[2:]
    return grad_q, grad_k.new_empty(shape), grad_v.new_empty(shape)


def _keep_padded(piece: _Piece, grads: Blocks, grad_qkv: Tensor, grad_padding: Tensor) -> None:
    """Bring gradients from new memory to their place; the last key's belong to the padding."""
    if not piece.padded:
        return
    for which, (place, grad) in enumerate(zip(piece.block(grad_qkv).unbind(2)[1:], grads[1:], strict=True)):
        place.copy_(grad[:, :-1])
        grad_padding[which] += grad[:, -1].sum(0, dtype=grad_padding.dtype)
