"""Softmax attention of many windows and its gradient, a few attention maps at a time.

At the published size one block of the first stage has 2,100 maps of 343 x 343: about 1 GB. Here each core works on a
few maps at a time, which stay in its cache, and the gradient computes them again from the same numbers.

Shape suffixes: N rows in window order (all positions of all samples), M windows, P positions of one window, K keys
(P, or P + 1 with the padding), A heads, d channels of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mg3d.models.vision_encoders.compiled import WithoutInterpreterLock
from mg3d.models.vision_encoders.windows import WindowGroup
from mg3d.models.vision_encoders.worker_threads import run_shares, share_out

CUDA_MAP_BYTES = 2**30
"""Attention maps worked on at a time on a GPU: few kernel launches."""
CPU_MAP_BYTES = 2**21
"""The same for each core of a CPU: a few maps, near its own cache."""

Blocks = tuple[Tensor, Tensor, Tensor]


def attend(
    qkv_N3Ad: Tensor, padding_2Ad: Tensor, groups: Sequence[WindowGroup], scale: float, biases: Sequence[Tensor]
) -> Tensor:
    """``softmax(scale * q k^T + bias) v`` of every window.

    Args:
        qkv_N3Ad: queries, keys and values in window order.
        padding_2Ad: key and value that all padded positions share.
        groups: the windows, whose rows follow each other.
        scale: of the products.
        biases: ``[A, P, K]`` of every group; its last key joins the padded positions.

    Returns:
        ``[N, A, d]``.
    """
    result = torch.empty_like(qkv_N3Ad[:, 0])

    def work(pieces: list[_Piece]) -> None:
        for piece in pieces:
            bias, operands = biases[piece.group], _operands(piece, qkv_N3Ad, padding_2Ad)
            _attend_windows(*operands, bias, piece.block(result), scale, *_steps(bias, piece.windows))

    with torch.autocast(qkv_N3Ad.device.type, enabled=False):
        run_shares(work, _pieces(qkv_N3Ad, groups))
    return result


class AttentionGradient(NamedTuple):
    """What :func:`attend_backward` finds.

    Attributes:
        qkv: ``[N, 3, A, d]``.
        padding: ``[2, A, d]`` of the key and value of padded positions.
        biases: ``[A, P, K]`` of every group.
    """

    qkv: Tensor
    padding: Tensor
    biases: list[Tensor]


def attend_backward(
    grad_NAd: Tensor,
    result_NAd: Tensor,
    qkv: Tensor,
    padding_2Ad: Tensor,
    groups: Sequence[WindowGroup],
    scale: float,
    biases: Sequence[Tensor],
) -> AttentionGradient:
    """Gradient of :func:`attend` with the same arguments, of its result and the gradient of that.

    Args:
        grad_NAd: gradient of the result, contiguous.
        result_NAd: what :func:`attend` returned.
        qkv: queries, keys and values.
        padding_2Ad: key and value of padded positions.
        groups: the windows.
        scale: of the products.
        biases: of every group.
    """
    grad_qkv = torch.empty_like(qkv)

    def work(pieces: list[_Piece]) -> tuple[Tensor, dict[int, Tensor]]:
        grad_padding = torch.zeros_like(padding_2Ad, dtype=biases[0].dtype)
        grad_biases = {index: torch.zeros_like(biases[index]) for index in {piece.group for piece in pieces}}
        for piece in pieces:
            bias, operands = biases[piece.group], _operands(piece, qkv, padding_2Ad)
            of_result = piece.block(grad_NAd), piece.block(result_NAd)
            grads, steps = _gradient_room(piece, grad_qkv), _steps(bias, piece.windows)
            _backward_windows(*operands, *of_result, *grads, bias, grad_biases[piece.group], scale, *steps)
            _keep_padded(piece, grads, grad_qkv, grad_padding)
        return grad_padding, grad_biases

    with torch.autocast(qkv.device.type, enabled=False):
        found = run_shares(work, _pieces(qkv, groups))
    grad_padding = torch.stack([padding for padding, _ in found]).sum(0).to(padding_2Ad.dtype)
    of_bias = [[part[index] for _, part in found if index in part] for index in range(len(biases))]
    grad_biases = [parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in of_bias]
    return AttentionGradient(grad_qkv, grad_padding, grad_biases)


def _steps(bias_APK: Tensor, windows: int) -> tuple[int, int]:
    """Heads and windows at a time whose maps fit the cache: one head, unless several fit with all their windows."""
    room_bytes = CPU_MAP_BYTES if bias_APK.device.type == "cpu" else CUDA_MAP_BYTES
    fitting = max(1, room_bytes // (bias_APK[0].numel() * bias_APK.element_size()))
    return min(len(bias_APK), max(1, fitting // windows)), min(windows, fitting)


def _part(block_MPAd: Tensor, m: int, windows: int, a: int, heads: int) -> Tensor:
    """View ``[A, M, P, d]`` of some windows and heads; flattening the first two axes copies nothing for one head."""
    return block_MPAd[m : m + windows, :, a : a + heads].permute(2, 0, 1, 3)


def _softmax_maps(maps: Tensor, bias_A1PK: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    """Write the softmax weights ``[A * M, P, K]`` to ``maps``."""
    by_head = maps.unflatten(0, [bias_A1PK.size(0), -1])
    if q.dtype != maps.dtype:
        torch.add(bias_A1PK, torch.bmm(q * scale, k.mT).view(by_head.shape), out=by_head)
    elif bias_A1PK.size(0) == 1:
        torch.baddbmm(bias_A1PK[0], q, k.mT, alpha=scale, out=maps)
    else:
        by_head.copy_(bias_A1PK)
        torch.baddbmm(maps, q, k.mT, alpha=scale, out=maps)
    torch.softmax(maps, dim=-1, out=maps)


@WithoutInterpreterLock
def _attend_windows(
    q_MPAd: Tensor,
    k_MKAd: Tensor,
    v_MKAd: Tensor,
    bias_APK: Tensor,
    result_MPAd: Tensor,
    scale: float,
    heads: int,
    windows: int,
) -> None:
    """Write the result of some windows, so many heads and windows at a time."""
    # memory of its own for the maps: what comes from the allocator is seldom in this core's cache
    room = bias_APK.new_empty([heads * windows, bias_APK.size(1), bias_APK.size(2)])
    for a in range(0, bias_APK.size(0), heads):
        bias = bias_APK[a : a + heads].unsqueeze(1)
        for m in range(0, q_MPAd.size(0), windows):
            q = _part(q_MPAd, m, windows, a, heads).flatten(0, 1)
            k = _part(k_MKAd, m, windows, a, heads).flatten(0, 1)
            v = _part(v_MKAd, m, windows, a, heads).flatten(0, 1)
            maps = room[: q.size(0)]
            _softmax_maps(maps, bias, q, k, scale)
            target = _part(result_MPAd, m, windows, a, heads)
            target.copy_(torch.bmm(maps.to(v.dtype), v).view(target.shape))


@WithoutInterpreterLock
def _backward_windows(
    q_MPAd: Tensor,
    k_MKAd: Tensor,
    v_MKAd: Tensor,
    grad_MPAd: Tensor,
    result_MPAd: Tensor,
    to_q: Tensor,
    to_k: Tensor,
    to_v: Tensor,
    bias_APK: Tensor,
    to_bias: Tensor,
    scale: float,
    heads: int,
    windows: int,
) -> None:
    """Write the gradients of q, k and v of some windows; those of the bias are added to its own."""
    # derivative of softmax: a * (da - sum(a * da)); the sum equals grad . result
    inner_MPA1 = (grad_MPAd * result_MPAd).sum(-1, keepdim=True, dtype=bias_APK.dtype).neg_()
    rooms = bias_APK.new_empty([2, heads * windows, bias_APK.size(1), bias_APK.size(2)])
    for a in range(0, bias_APK.size(0), heads):
        bias = bias_APK[a : a + heads].unsqueeze(1)
        for m in range(0, q_MPAd.size(0), windows):
            q = _part(q_MPAd, m, windows, a, heads).flatten(0, 1)
            k = _part(k_MKAd, m, windows, a, heads).flatten(0, 1)
            v = _part(v_MKAd, m, windows, a, heads).flatten(0, 1)
            grad = _part(grad_MPAd, m, windows, a, heads).flatten(0, 1)
            inner = _part(inner_MPA1, m, windows, a, heads).flatten(0, 1)
            maps, slope = rooms[0, : q.size(0)], rooms[1, : q.size(0)]
            _softmax_maps(maps, bias, q, k, scale)
            if grad.dtype == slope.dtype:
                torch.baddbmm(inner, grad, v.mT, out=slope)
            else:
                torch.add(inner, torch.bmm(grad, v.mT), out=slope)
            slope.mul_(maps)
            to_bias[a : a + heads].add_(slope.unflatten(0, [bias.size(0), -1]).sum(1))
            maps, slope = maps.to(q.dtype), slope.to(q.dtype)
            target = _part(to_v, m, windows, a, heads)
            target.copy_(torch.bmm(maps.mT, grad).view(target.shape))
            target = _part(to_q, m, windows, a, heads)
            torch.mul(torch.bmm(slope, k).view(target.shape), scale, out=target)
            target = _part(to_k, m, windows, a, heads)
            torch.mul(torch.bmm(slope.mT, q).view(target.shape), scale, out=target)


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
