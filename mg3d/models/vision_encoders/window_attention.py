"""Window attention on the unpadded grid.

The grid is put into the order of its windows once; windows are cut to the positions that exist
(:mod:`mg3d.models.vision_encoders.windows`), and their maps are worked on a few at a time
(:mod:`mg3d.models.vision_encoders.attention_maps`).

Shape suffixes: B batch, D/H/W grid axes, N rows in window order (all positions of all samples), P positions of one
window, K keys (P, or P + 1 with the padding), A heads, d channels of one head, C = A * d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets.swin_unetr import WindowAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

from mg3d.models.vision_encoders.attention_maps import attend, attend_backward
from mg3d.models.vision_encoders.windows import WindowGroup, window_groups, window_order


class GridWindowAttention(WindowAttention):
    """MONAI's window attention, same parameters and results, applied to a grid instead of to padded windows.

    Args:
        *args: of MONAI's attention.
        **options: of MONAI's attention.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rows: dict[tuple[tuple[WindowGroup, ...], torch.device], Tensor] = {}

    @torch.compiler.disable  # works through its windows in a loop of its own
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
        biases = self.position_biases(groups, _map_dtype(qkv.dtype))
        attended_NC = _Attention.apply(qkv, self._padding_key_value(qkv), groups, self.scale, *biases)
        return _Reorder.apply(self.proj(attended_NC), back, order).view(grid_BDHWC.shape)

    def position_biases(self, groups: tuple[WindowGroup, ...], dtype: torch.dtype) -> list[Tensor]:
        """Relative position bias ``[A, P, K]`` of every group, looked up for all groups at once.

        The last key, where there is padding, joins the padded positions: log of the sum of their exponentials.

        Args:
            groups: windows that are alike.
            dtype: of the attention maps.
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
    """:func:`attend`, flattened to ``[N, C]``; keeps only q, k, v and the result for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, qkv_N3Ad: Tensor, padding_2Ad: Tensor, groups: Sequence[WindowGroup], scale: float, *biases: Tensor
    ) -> Tensor:
        result = attend(qkv_N3Ad, padding_2Ad, groups, scale, biases)
        ctx.save_for_backward(qkv_N3Ad, padding_2Ad, result, *biases)
        ctx.groups, ctx.scale = groups, scale
        return result.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        qkv, padding_2Ad, result, *biases = ctx.saved_tensors
        grad = grad_NC.contiguous().view(result.shape).to(qkv.dtype)
        found = attend_backward(grad, result, qkv, padding_2Ad, ctx.groups, ctx.scale, biases)
        return found.qkv, found.padding, None, None, *found.biases


def _map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Number type of attention maps: single precision for the half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
