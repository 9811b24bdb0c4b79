"""What a report generator sees of a volume: maps of all resolutions, pooled to 3 x 3 x 3 patches (spec downstream 8.4).

Shape suffixes: B batch, D/H/W volume axes, P = 27 patches, F feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import UnetrBasicBlock
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.vision_encoders.base import VisionEncoder
from mg3d.models.vision_encoders.swin import SwinEncoder

GRID = 3
PATCHES = GRID**3
NORMS = ("channels", "positions_reference")
LEAST_DEVIATION = 1e-3


def add_refining_blocks(owner: nn.Module, stage_channels: Sequence[int]) -> tuple[int, ...]:
    """Give a module SwinUNETR's ``encoder1..4``, which pre-trained files may hold.

    Args:
        owner: receives the blocks.
        stage_channels: channels of the encoder's maps.

    Returns:
        Channels of the refined maps.
    """
    widths = (stage_channels[0], *stage_channels[:3])
    for number, (inner, outer) in enumerate(zip((1, *stage_channels[:3]), widths, strict=True), start=1):
        owner.add_module(f"encoder{number}", UnetrBasicBlock(3, inner, outer, 3, 1, "instance", res_block=True))
    return widths


def refine(owner: nn.Module, vol_B1DHW: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """The volume and the maps x0, x1, x2 through the blocks of `add_refining_blocks`."""
    seen = (vol_B1DHW, *maps[:3])
    return [owner.get_submodule(f"encoder{number}")(each) for number, each in enumerate(seen, start=1)]


class MultiScaleFeatures(nn.Module):
    """Pooled maps of an encoder side by side.

    Swin encoders: SwinUNETR's ``encoder1`` of the volume, ``encoder2..4`` of the maps x0..x2, and x4, so that F is 1152
    for Swin-B and 2304 for Swin-L. Other encoders: all their maps.

    Args:
        encoder: the image encoder.
        norm: ``channels``: every patch is normalised over its channels, after the statistics of `fit` if there are any;
            ``positions_reference``: every channel over the 27 patches. The latter is as published; it takes the mean
            away that the global feature consists of, so that this one is the same for all images.

    Raises:
        ValueError: unknown norm.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, encoder: VisionEncoder, norm: str = "channels") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.encoder = encoder
        self.norm_kind = norm
        self.blocks = isinstance(encoder, SwinEncoder)
        widths = encoder.stage_channels
        if self.blocks:
            refined = add_refining_blocks(self, widths)
            widths = (*refined, widths[-1])
        self.width = sum(widths)
        self.norm = nn.LayerNorm(PATCHES if norm == "positions_reference" else self.width)
        self.register_buffer("mean", torch.zeros(PATCHES, self.width))
        self.register_buffer("deviation", torch.ones(PATCHES, self.width))

    def pooled(self, vol_B1DHW: Tensor) -> Tensor:
        """Maps of a volume, averaged over 3 x 3 x 3 parts: [B, P, F] in D-major order. A frozen encoder keeps these."""
        maps = self.encoder.forward_features(vol_B1DHW, normalize=True)
        if self.blocks:
            maps = [*refine(self, vol_B1DHW, maps), maps[-1]]
        parts = [functional.adaptive_avg_pool3d(each, GRID).flatten(2) for each in maps]
        return torch.cat(parts, dim=1).transpose(1, 2)

    @torch.no_grad()
    def fit(self, pooled_BPF: Tensor) -> None:
        """Take the statistics of the training volumes, of every patch and channel alone."""
        deviation, mean = torch.std_mean(pooled_BPF, dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=LEAST_DEVIATION))

    def forward(self, pooled_BPF: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise pooled maps.

        Args:
            pooled_BPF: from :meth:`pooled`.

        Returns:
            patch features [B, P, F] and the global feature [B, F], their mean.
        """
        if self.norm_kind == "positions_reference":
            feat_BPF = self.norm(pooled_BPF.transpose(1, 2)).transpose(1, 2)
        else:
            feat_BPF = self.norm((pooled_BPF - self.mean) / self.deviation)
        return feat_BPF, feat_BPF.mean(dim=1)

    def freeze(self) -> None:
        """Stop learning in everything that comes before the pooled maps."""
        for name, part in self.named_children():
            if name != "norm":
                part.requires_grad_(False).eval()
