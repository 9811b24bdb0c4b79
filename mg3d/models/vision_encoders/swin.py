"""3D Swin transformer encoders Swin-B and Swin-L, built from MONAI's blocks.

The published weights were trained with a patch merging that reads two of the eight sub-grids twice and two never
("legacy"); current MONAI ships the corrected order under the same parameter names. Both orders live here.

Shape suffixes: B batch, C channels, D/H/W volume axes, N image tokens, E token width, P positions of one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from monai.networks.blocks import PatchEmbed, UnetrBasicBlock
from monai.networks.nets.swin_unetr import SwinTransformerBlock, get_window_size
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils import checkpoint

from mg3d.models.vision_encoders.base import VisionEncoder, channel_norm, check_volume, map_to_tokens
from mg3d.models.vision_encoders.fused_attention import attention_half, can_fuse_attention
from mg3d.models.vision_encoders.fused_mlp import can_fuse_mlp, mlp_half
from mg3d.models.vision_encoders.window_attention import GridWindowAttention

MERGING_OFFSETS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
    "fixed": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
}
"""(d, h, w) offsets of the eight sub-grids in the order in which patch merging concatenates them."""


class PatchMerging(nn.Module):
    """Halve the grid: concatenate eight sub-grids, LayerNorm(8C), bias-free Linear(8C -> 2C).

    Args:
        dim: channels C of the input.
        order: ``legacy`` (published weights) or ``fixed``.

    Raises:
        ValueError: unknown order.
    """

    def __init__(self, dim: int, order: str = "legacy") -> None:
        super().__init__()
        if order not in MERGING_OFFSETS:
            raise ValueError(f"patch_merging must be one of {sorted(MERGING_OFFSETS)}, got {order!r}")
        self.order = order
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, map_BDHWC: Tensor) -> Tensor:
        """Merge to ``[B, ceil(D/2), ceil(H/2), ceil(W/2), 2C]``; an odd axis gets one zero layer at its end."""
        d, h, w = map_BDHWC.shape[1:4]
        if d % 2 or h % 2 or w % 2:
            map_BDHWC = functional.pad(map_BDHWC, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        return self.reduction(self.norm(_SubGrids.apply(map_BDHWC, MERGING_OFFSETS[self.order])))


class _SubGrids(torch.autograd.Function):
    """Concatenate strided sub-grids along the channels; the gradient is written once instead of once per sub-grid."""

    @staticmethod
    def forward(ctx: Any, map_BDHWC: Tensor, offsets: Sequence[tuple[int, int, int]]) -> Tensor:
        ctx.shape, ctx.offsets = map_BDHWC.shape, offsets
        return torch.cat([map_BDHWC[:, i::2, j::2, k::2] for i, j, k in offsets], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDHWC: Tensor) -> tuple[Tensor, None]:
        grad = grad_BDHWC.new_empty(ctx.shape)
        parts = grad_BDHWC.chunk(len(ctx.offsets), dim=-1)
        for i, j, k in product((0, 1), repeat=3):
            found = [part for part, offset in zip(parts, ctx.offsets, strict=True) if offset == (i, j, k)]
            target = grad[:, i::2, j::2, k::2]
            target.copy_(found[0] if found else target.new_zeros(()))
            for part in found[1:]:
                target += part
        return grad, None


class SwinBlock(SwinTransformerBlock):
    """MONAI's block (LayerNorm, window attention, MLP, two residuals) without padding, rolling and masks.

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: window edge per axis.
        shift_size: cyclic shift per axis, zero for plain windows.
        **options: further options of MONAI's block.
    """

    attn: GridWindowAttention

    def __init__(
        self, dim: int, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int], **options: Any
    ) -> None:
        super().__init__(dim, num_heads, window_size, shift_size, qkv_bias=True, **options)
        self.attn = GridWindowAttention(dim, num_heads, window_size, qkv_bias=True)

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        """Attention and MLP, each with its residual; ``x`` is ``[B, D, H, W, C]``, the mask is not needed."""
        whole = isinstance(self.drop_path, nn.Identity) or not self.training
        if not (whole and can_fuse_attention(self.norm1, self.attn, x) and can_fuse_mlp(self.norm2, self.mlp, x)):
            return super().forward(x, mask_matrix)
        window, shift = get_window_size(x.shape[1:4], self.window_size, self.shift_size)
        inputs = self.norm1, self.attn, x, window, shift
        if self.use_checkpoint and torch.is_grad_enabled():
            x = checkpoint.checkpoint(attention_half, *inputs, use_reentrant=False)
        else:
            x = attention_half(*inputs)
        return mlp_half(self.norm2, self.mlp, x)  # keeps its input only, nothing for a checkpoint to save

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        """Normalise and attend; ``x`` is ``[B, D, H, W, C]``, the mask of MONAI's signature is not needed."""
        window, shift = get_window_size(x.shape[1:4], self.window_size, self.shift_size)
        return self.attn(self.norm1(x), window, shift)


class SwinStage(nn.Module):
    """Blocks of one resolution with alternating plain and shifted windows, then patch merging.

    Args:
        dim: channels of the input.
        depth: number of blocks.
        num_heads: attention heads.
        window_size: window edge per axis, in grid cells; clamped where the grid is smaller.
        patch_merging: order of the merging layer.
        mlp_ratio: hidden width of the MLP over ``dim``.
        use_checkpoint: recompute activations in the backward pass.
        drop_path: stochastic depth rate per block.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: tuple[int, ...],
        patch_merging: str,
        mlp_ratio: float = 4.0,
        use_checkpoint: bool = False,
        drop_path: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = tuple(edge // 2 for edge in window_size)
        rates = tuple(drop_path) or (0.0,) * depth
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=dim,
                num_heads=num_heads,
                window_size=window_size,
                shift_size=self.shift_size if index % 2 else (0, 0, 0),
                mlp_ratio=mlp_ratio,
                drop_path=rates[index],
                use_checkpoint=use_checkpoint,
            )
            for index in range(depth)
        )
        self.downsample = PatchMerging(dim, patch_merging)

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Attend and merge: ``[B, C, D, H, W]`` -> ``[B, 2C, ceil(D/2), ceil(H/2), ceil(W/2)]``."""
        hidden_BDHWC = map_BCDHW.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            hidden_BDHWC = block(hidden_BDHWC, None)
        return self.downsample(hidden_BDHWC).permute(0, 4, 1, 2, 3)


class TokenPositionNorm(nn.Module):
    """Normalise every token position over batch and channels, also in eval mode (spec pretraining 6.2).

    The published head applies ``BatchNorm1d(affine=False, track_running_stats=False)`` to ``[B, N, E]``, so N takes
    the place of the channel axis: outputs depend on the rest of the batch.
    """

    def forward(self, tok_BNE: Tensor) -> Tensor:
        """Return normalised tokens of the same shape (biased variance, eps 1e-5)."""
        wide = tok_BNE.float()
        variance, mean = torch.var_mean(wide, dim=(0, 2), correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(variance + 1e-5)).to(tok_BNE.dtype)


class ProjectionHead(nn.Module):
    """Three linear layers on the tokens; :class:`TokenPositionNorm` and ReLU after the first two.

    Args:
        in_dim: token width before.
        hidden_dim: width between.
        out_dim: token width after.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(in_dim, hidden_dim), TokenPositionNorm(), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), TokenPositionNorm(), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Linear(hidden_dim, out_dim))

    def forward(self, tok_BNE: Tensor) -> Tensor:
        """Project tokens ``[B, N, in_dim]`` to ``[B, N, out_dim]``."""
        return self.layer3(self.layer2(self.layer1(tok_BNE)))


class SwinEncoder(VisionEncoder):
    """3D Swin transformer whose parameters carry the published names.

    Args:
        name: registry name, kept in the metadata.
        embed_dim: channels after patch embedding (48 for Swin-B, 96 for Swin-L).
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: window edge in grid cells, one number or one per axis.
        patch_size: voxels per patch, one number or one per axis.
        mlp_ratio: MLP width over channels.
        drop_path_rate: largest stochastic depth rate, rising linearly over the blocks (published: 0).
        proj_hidden_dim: hidden width of the projection head.
        proj_out_dim: token width after the projection head; 0 for none.
        patch_merging: ``legacy`` or ``fixed``.
        gradient_checkpointing: recompute block activations in the backward pass to save memory.
        residual_blocks: a residual convolution block before every stage (MONAI's ``use_v2``: SwinUNETR v2, VoCo).

    Raises:
        ValueError: inconsistent sizes.
    """

    def __init__(
        self,
        *,
        name: str = "swin_b",
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        patch_size: int | Sequence[int] = 2,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        proj_hidden_dim: int = 768,
        proj_out_dim: int = 0,
        patch_merging: str = "legacy",
        gradient_checkpointing: bool = False,
        residual_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.patch_merging, self.residual_blocks = patch_merging, bool(residual_blocks)
        self.depths, self.num_heads = tuple(depths), tuple(num_heads)
        self.window_size, self.patch_size = _triple(window_size, "window_size"), _triple(patch_size, "patch_size")
        self.mlp_ratio, self.embed_dim = float(mlp_ratio), int(embed_dim)
        _check_sizes(self.embed_dim, self.depths, self.num_heads)
        self.stage_channels = tuple(self.embed_dim * 2**k for k in range(len(self.depths) + 1))
        scale = 2 ** len(self.depths)
        self.stride = (self.patch_size[0] * scale, self.patch_size[1] * scale, self.patch_size[2] * scale)
        self.patch_embed = PatchEmbed(self.patch_size, 1, self.embed_dim, norm_layer=None)  # type: ignore[arg-type]
        self._build_stages(patch_merging, gradient_checkpointing, drop_path_rate)
        self.proj_head: ProjectionHead | None = None
        if proj_out_dim:
            self.proj_head = ProjectionHead(self.stage_channels[-1], proj_hidden_dim, proj_out_dim)
        self.proj_dims = (int(proj_hidden_dim), int(proj_out_dim)) if proj_out_dim else ()
        self.out_channels = int(proj_out_dim) or self.stage_channels[-1]
        _hide_index_buffers(self)
        self._drop_indices = self.register_load_state_dict_pre_hook(_drop_index_entries)

    def _build_stages(self, patch_merging: str, use_checkpoint: bool, drop_path_rate: float) -> None:
        blocks = sum(self.depths)
        rates = [drop_path_rate * index / max(1, blocks - 1) for index in range(blocks)]
        for k, depth in enumerate(self.depths):
            stage = SwinStage(
                self.stage_channels[k],
                depth,
                self.num_heads[k],
                self.window_size,
                patch_merging,
                mlp_ratio=self.mlp_ratio,
                use_checkpoint=use_checkpoint,
                drop_path=rates[sum(self.depths[:k]) : sum(self.depths[: k + 1])],
            )
            self.add_module(f"layers{k + 1}", nn.ModuleList([stage]))
            if self.residual_blocks:
                width = self.stage_channels[k]
                block = UnetrBasicBlock(3, width, width, kernel_size=3, stride=1, norm_name="instance", res_block=True)
                self.add_module(f"layers{k + 1}c", nn.ModuleList([block]))

    def forward_features(self, vol_B1DHW: Tensor, normalize: bool = True) -> list[Tensor]:
        """Compute the feature maps x0 (patch embedding) to x4 (last stage), finest first.

        Args:
            vol_B1DHW: volumes in [0, 1].
            normalize: LayerNorm over channels without parameters, as in the published encoder.

        Returns:
            Maps ``[B, embed_dim * 2^k, D_k, H_k, W_k]`` for k = 0..len(depths).
        """
        check_volume(vol_B1DHW)
        # channels last in memory, as every later layer wants them: one copy instead of one per layer
        maps = [self.patch_embed(vol_B1DHW).contiguous(memory_format=torch.channels_last_3d)]
        for k in range(len(self.depths)):
            hidden = maps[-1]
            if self.residual_blocks:  # in MONAI's memory layout, which decides about the last digits
                hidden = self._layer(f"layers{k + 1}c")(hidden.contiguous())
                hidden = hidden.contiguous(memory_format=torch.channels_last_3d)
            maps.append(self._layer(f"layers{k + 1}")(hidden))
        return [channel_norm(each) for each in maps] if normalize else maps

    def _layer(self, name: str) -> nn.Module:
        layers: nn.ModuleList = self.get_submodule(name)  # type: ignore[assignment]
        return layers[0]

    def tokens(self, vol_B1DHW: Tensor) -> Tensor:
        """Encode to tokens ``[B, N, E]``: the normalised last map in D-major order, projected where a head exists."""
        tok_BNE = map_to_tokens(channel_norm(self.forward_features(vol_B1DHW, normalize=False)[-1]))
        return tok_BNE if self.proj_head is None else self.proj_head(tok_BNE)

    def keep_index_entries(self) -> None:
        """Store the constant relative position indices as MONAI does, so that state dicts have the same entries."""
        self._drop_indices.remove()
        for module in self.modules():
            module._non_persistent_buffers_set.discard("relative_position_index")

    def metadata(self) -> dict[str, Any]:
        """Architecture in plain types; enough to rebuild the encoder."""
        return {
            "name": self.name,
            "patch_merging": self.patch_merging,
            "embed_dim": self.embed_dim,
            "depths": list(self.depths),
            "num_heads": list(self.num_heads),
            "window_size": list(self.window_size),
            "patch_size": list(self.patch_size),
            "mlp_ratio": self.mlp_ratio,
            "proj_dims": list(self.proj_dims),
            "out_channels": self.out_channels,
            "stride": list(self.stride),
            **({"residual_blocks": True} if self.residual_blocks else {}),
        }


def build_swin_b(**options: Any) -> SwinEncoder:
    """Swin-B: embed 48, depths 2-2-2-2, heads 3-6-12-24, tokens of width 768."""
    settings: dict[str, Any] = {"name": "swin_b", "embed_dim": 48}
    return SwinEncoder(**(settings | options))


def build_swin_l(**options: Any) -> SwinEncoder:
    """Swin-L: embed 96 (last stage 1536) and a projection head 1536 -> 768 -> 768 -> 768 on the tokens."""
    settings: dict[str, Any] = {"name": "swin_l", "embed_dim": 96, "proj_out_dim": 768}
    return SwinEncoder(**(settings | options))


def _triple(value: int | Sequence[int], key: str) -> tuple[int, int, int]:
    values = (value,) * 3 if isinstance(value, int) else tuple(int(edge) for edge in value)
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{key} must be a positive integer or three of them, got {value!r}")
    return values[0], values[1], values[2]


def _check_sizes(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> None:
    if len(depths) != len(num_heads) or not depths:
        raise ValueError(f"depths {depths} and num_heads {num_heads} must be non-empty and of the same length")
    for k, heads in enumerate(num_heads):
        if embed_dim * 2**k % heads:
            raise ValueError(f"stage {k + 1} has {embed_dim * 2**k} channels, not divisible by its {heads} heads")


def _hide_index_buffers(encoder: nn.Module) -> None:
    """Keep the constant relative position indices out of the state dict; they follow from the window size."""
    for module in encoder.modules():
        if "relative_position_index" in module._buffers:
            module._non_persistent_buffers_set.add("relative_position_index")


def _drop_index_entries(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let states written by the published code, which stores the constant indices, load strictly."""
    for key in [key for key in state if key.startswith(prefix) and key.endswith(".relative_position_index")]:
        state.pop(key)
