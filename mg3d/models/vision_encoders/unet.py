"""3D U-Net encoders of the published "UNet" weights: four double convolutions and an average pool.

Two flavours share layout and names: ``unet`` (Models-Genesis style) and ``unet_pcrlv2`` (ordinary batch norm);
spec pretraining 6.3. Shape suffixes: B batch, C channels, D/H/W volume axes, N tokens, E token width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mg3d.models.vision_encoders.base import VisionEncoder, channel_norm, check_volume, map_to_tokens, pad_to_multiple

STAGE_NAMES = ("down_tr64", "down_tr128", "down_tr256", "down_tr512")


class AlwaysBatchNorm3d(nn.BatchNorm3d):
    """Batch norm that uses the statistics of the batch in eval mode too, and keeps updating its running buffers."""

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Normalise over batch and space, affine."""
        return functional.batch_norm(
            map_BCDHW,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=True,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )


class ConvUnit(nn.Module):
    """3x3x3 convolution, batch norm, ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        norm: batch norm class.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: type[nn.BatchNorm3d]) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.bn1 = norm(out_channels)

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Convolve at the same resolution."""
        return functional.relu(self.bn1(self.conv1(map_BCDHW)))


class DoubleConv(nn.Module):
    """Two :class:`ConvUnit`; the second doubles the width of the first.

    Args:
        in_channels: channels of the input.
        width: channels after the first convolution.
        norm: batch norm class.
    """

    def __init__(self, in_channels: int, width: int, norm: type[nn.BatchNorm3d]) -> None:
        super().__init__()
        self.ops = nn.Sequential(ConvUnit(in_channels, width, norm), ConvUnit(width, 2 * width, norm))

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Return ``[B, 2 * width, D, H, W]``."""
        return self.ops(map_BCDHW)


class UNetEncoder(VisionEncoder):
    """Contracting path of a 3D U-Net with total stride 32.

    Channels 1 -> w -> 2w, 2w -> 2w -> 4w, 4w -> 4w -> 8w, 8w -> 8w -> 16w with w = ``base_width``; max-pool 2 after the
    first three, average pool 4 at the end. Each axis is zero-padded at its end to a multiple of 32.

    Args:
        name: registry name, kept in the metadata.
        base_width: width w of the first convolution (published: 48, tokens of width 768).
        batch_statistics: always normalise with batch statistics (``unet``); False: ordinary batch norm.
        gradient_checkpointing: recompute stage activations in the backward pass.

    Raises:
        ValueError: ``base_width`` below 1.
    """

    def __init__(
        self,
        *,
        name: str = "unet",
        base_width: int = 48,
        batch_statistics: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if base_width < 1:
            raise ValueError(f"base_width must be at least 1, got {base_width}")
        self.name, self.base_width = name, int(base_width)
        self.gradient_checkpointing = gradient_checkpointing
        norm = AlwaysBatchNorm3d if batch_statistics else nn.BatchNorm3d
        channels = 1
        for k, stage in enumerate(STAGE_NAMES):
            width = self.base_width * 2**k
            self.add_module(stage, DoubleConv(channels, width, norm))
            channels = 2 * width
        self.stage_channels = (*(2 * self.base_width * 2**k for k in range(4)), channels)
        self.out_channels = channels
        self.stride = (32, 32, 32)
        self.register_load_state_dict_pre_hook(_drop_unused_head)

    def forward_features(self, vol_B1DHW: Tensor, normalize: bool = False) -> list[Tensor]:
        """Compute the maps at strides 1, 2, 4 and 8 and the pooled map at stride 32.

        Args:
            vol_B1DHW: volumes in [0, 1].
            normalize: channel LayerNorm without parameters on every map; the published encoder has none.

        Returns:
            Maps ``[B, C_k, D_k, H_k, W_k]``, finest first.
        """
        check_volume(vol_B1DHW)
        hidden = pad_to_multiple(vol_B1DHW, self.stride)
        maps: list[Tensor] = []
        for k, stage in enumerate(STAGE_NAMES):
            if k:
                hidden = functional.max_pool3d(hidden, 2)
            hidden = self._run_stage(self.get_submodule(stage), hidden)
            maps.append(hidden)
        maps.append(functional.avg_pool3d(hidden, 4))
        return [channel_norm(each) for each in maps] if normalize else maps

    def forward(self, vol_B1DHW: Tensor, normalize: bool = False) -> list[Tensor]:
        """Same as :meth:`forward_features`."""
        return self.forward_features(vol_B1DHW, normalize)

    def tokens(self, vol_B1DHW: Tensor) -> Tensor:
        """Encode to tokens ``[B, N, 16 * base_width]``: the pooled map in D-major order, not normalised."""
        return map_to_tokens(self.forward_features(vol_B1DHW)[-1])

    def metadata(self) -> dict[str, Any]:
        """Architecture in plain types; enough to rebuild the encoder."""
        return {
            "name": self.name,
            "base_width": self.base_width,
            "out_channels": self.out_channels,
            "stride": list(self.stride),
        }

    def _run_stage(self, stage: nn.Module, hidden: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return stage(hidden)
        return checkpoint(
            stage, hidden, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(stage))
        )


def build_unet(patch_merging: str = "legacy", **options: Any) -> UNetEncoder:
    """Models-Genesis style encoder of the published UNet weights; it merges no patches."""
    return UNetEncoder(**options)


def build_unet_pcrlv2(patch_merging: str = "legacy", **options: Any) -> UNetEncoder:
    """PCRLv2 style encoder: same widths, ordinary batch norm; it merges no patches."""
    settings: dict[str, Any] = {"name": "unet_pcrlv2", "batch_statistics": False}
    return UNetEncoder(**(settings | options))


def _drop_unused_head(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let states of the PCRLv2 file, which carries a classifier nobody calls, load strictly."""
    for name in ("weight", "bias"):
        state.pop(f"{prefix}head.{name}", None)


@contextmanager
def _frozen_statistics(stage: nn.Module) -> Iterator[None]:
    """Leave running statistics alone while a checkpointed stage is recomputed; the first pass updated them."""
    norms = [module for module in stage.modules() if isinstance(module, nn.BatchNorm3d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
