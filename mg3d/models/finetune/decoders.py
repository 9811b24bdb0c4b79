"""Segmentation networks: an image encoder of this project with the decoder of its family.

| decoder | encoders | network |
|---|---|---|
| swin_unetr | swin_b, swin_l | MONAI's ``SwinUNETR`` with its names (``swinViT.*``, ``encoder1.*`` ...) |
| unet | unet, unet_pcrlv2 | expanding path of a 3-D U-Net |
| nnunet | nnunet, nnunet_resenc | nnU-Net's decoder |

A prediction depends on its own window alone: decoders use instance norm. Shape suffixes: B batch, C channels,
X/Y/Z volume axes, K classes with background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn

from mg3d.errors import ConfigError
from mg3d.models.vision_encoders.base import VisionEncoder, pad_to_multiple
from mg3d.models.vision_encoders.monai_swin import swin_unetr_options
from mg3d.models.vision_encoders.swin import SwinEncoder
from mg3d.models.vision_encoders.unet import UNetEncoder

__all__ = ["NNUNetSegmenter", "SwinSegmenter", "UNetSegmenter", "build_segmenter", "check_window", "decoder_of"]


class SwinSegmenter(SwinUNETR):
    """MONAI's SwinUNETR whose ``swinViT`` is this project's encoder; state dicts have MONAI's entries, all of them.

    Args:
        encoder: a Swin encoder of four stages; a projection head is taken away.
        num_classes: K.

    Raises:
        ValueError: an encoder that SwinUNETR cannot hold.
    """

    def __init__(self, encoder: SwinEncoder, num_classes: int) -> None:
        options = swin_unetr_options(encoder.metadata())
        super().__init__(out_channels=num_classes, **options)
        encoder.proj_head, encoder.proj_dims, encoder.out_channels = None, (), encoder.stage_channels[-1]
        encoder.keep_index_entries()
        self.add_module("swinViT", encoder)

    @property
    def vision_encoder(self) -> VisionEncoder:
        """The image encoder."""
        return self.get_submodule("swinViT")  # type: ignore[return-value]

    def forward(self, x_in: Tensor) -> Tensor:
        """Logits ``[B, K, X, Y, Z]`` of volumes ``[B, 1, X, Y, Z]`` of any size (padded with zeros inside)."""
        x, y, z = x_in.shape[2:]
        return super().forward(pad_to_multiple(x_in, self.vision_encoder.stride))[:, :, :x, :y, :z]


class UNetSegmenter(nn.Module):
    """U-Net encoder and its expanding path: transposed convolution, skip connection, double convolution, three times.

    The pooled last map of the encoder is not used.

    Args:
        encoder: a UNet encoder.
        num_classes: K.
    """

    def __init__(self, encoder: UNetEncoder, num_classes: int) -> None:
        super().__init__()
        self.vision_encoder = encoder
        widths = encoder.stage_channels[:4]
        self.decoder = nn.ModuleList(_UpBlock(widths[k + 1], widths[k]) for k in reversed(range(3)))
        self.out = nn.Conv3d(widths[0], num_classes, kernel_size=1)

    def forward(self, vol_B1XYZ: Tensor) -> Tensor:
        """Logits ``[B, K, X, Y, Z]``."""
        x, y, z = vol_B1XYZ.shape[2:]
        *skips, hidden = self.vision_encoder.forward_features(vol_B1XYZ)[:4]
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            hidden = block(hidden, skip)
        return self.out(hidden)[:, :, :x, :y, :z]


class _UpBlock(nn.Module):
    """Double the resolution, take the skip connection in, two 3x3x3 convolutions with instance norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, out_channels, kernel_size=2, stride=2)
        layers: list[nn.Module] = []
        for width in (2 * out_channels, out_channels):
            layers += [
                nn.Conv3d(width, out_channels, kernel_size=3, padding=1, bias=False),
                nn.InstanceNorm3d(out_channels, affine=True),
                nn.ReLU(inplace=True),
            ]
        self.convs = nn.Sequential(*layers)

    def forward(self, low_BCXYZ: Tensor, skip_BCXYZ: Tensor) -> Tensor:
        return self.convs(torch.cat((self.up(low_BCXYZ), skip_BCXYZ), dim=1))


class NNUNetSegmenter(nn.Module):
    """nnU-Net encoder and nnU-Net's own decoder, without deep supervision.

    Args:
        encoder: an nnU-Net encoder.
        num_classes: K.
    """

    def __init__(self, encoder: VisionEncoder, num_classes: int) -> None:
        from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
        from dynamic_network_architectures.initialization.weight_init import InitWeights_He

        super().__init__()
        self.vision_encoder = encoder
        convolutions = 1 if encoder.name.endswith("resenc") else 2
        self.decoder = UNetDecoder(encoder.encoder, num_classes, convolutions, deep_supervision=False)  # type: ignore[arg-type]
        del self.decoder.encoder  # nnU-Net keeps a second reference, which would double every entry
        for layer in self.decoder.seg_layers[:-1]:
            layer.requires_grad_(False)  # outputs of deep supervision, never called here
        self.decoder.apply(InitWeights_He(1e-2))

    def forward(self, vol_B1XYZ: Tensor) -> Tensor:
        """Logits ``[B, K, X, Y, Z]``."""
        x, y, z = vol_B1XYZ.shape[2:]
        return self.decoder(self.vision_encoder.forward_features(vol_B1XYZ))[:, :, :x, :y, :z]


def decoder_of(encoder: VisionEncoder) -> str:
    """Name of the decoder that belongs to an encoder's family."""
    if isinstance(encoder, SwinEncoder):
        return "swin_unetr"
    return "unet" if isinstance(encoder, UNetEncoder) else "nnunet"


def build_segmenter(encoder: VisionEncoder, num_classes: int, decoder: str = "auto") -> nn.Module:
    """Put the decoder of its family on an encoder.

    Args:
        encoder: becomes part of the network.
        num_classes: K, background included.
        decoder: ``auto`` or the family's name.

    Returns:
        Network from ``[B, 1, X, Y, Z]`` to logits ``[B, K, X, Y, Z]`` with the encoder as ``vision_encoder``.

    Raises:
        ConfigError: the decoder belongs to another family, or the encoder's sizes do not fit it.
    """
    family = decoder_of(encoder)
    if decoder not in ("auto", family):
        raise ConfigError(f"decoder={decoder} does not fit encoder={encoder.name}", f"write decoder={family} or auto")
    try:
        if isinstance(encoder, SwinEncoder):
            return SwinSegmenter(encoder, num_classes)
        if isinstance(encoder, UNetEncoder):
            return UNetSegmenter(encoder, num_classes)
        return NNUNetSegmenter(encoder, num_classes)
    except ValueError as error:
        raise ConfigError(f"no {family} decoder for encoder={encoder.name}: {error}", "change feature_size") from error


def check_window(encoder: VisionEncoder, roi: Sequence[int]) -> None:
    """Refuse a window that the deepest layers cannot normalise.

    Raises:
        ConfigError: a single position is left, over which instance norm is undefined (32 x 32 x 32 at stride 32).
    """
    if isinstance(encoder, UNetEncoder):
        return
    stride = encoder.stride
    if all(size <= step for size, step in zip(roi, stride, strict=True)):
        least = [2 * stride[0], *stride[1:]]
        raise ConfigError(
            f"roi={list(roi)} leaves one position at stride {stride[0]}, over which instance norm is undefined",
            f"use a larger window, at least roi={least}",
        )
