"""Tokens of an image encoder for the cross-attention with prompts (spec downstream 7.4).

What a frozen encoder gives is computed once a volume and kept (`EncoderTokens.pooled`); the projection of Swin-L, which
learns, comes after it (`EncoderTokens.arrange`).

| image_tokens | kept of a volume | tokens of a published volume |
|---|---|---|
| x4 | the last map | 48 x 768; Swin-L's 1536 channels are projected |
| two_sets (Swin-L) | the last map beside ``encoder1..4`` of volume, x0, x1, x2, pooled to its grid | 48 x 768 twice |

Shape suffixes: B batch, N tokens of the last map, K kept channels, I tokens that are read, E their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.finetune.report_features import add_refining_blocks, refine
from mg3d.models.vision_encoders.base import VisionEncoder, channel_norm, map_to_tokens
from mg3d.models.vision_encoders.swin import ProjectionHead, SwinEncoder

__all__ = ["EncoderTokens"]


class TokenNorm(nn.Module):
    """Normalise every token over its channels, without parameters.

    The published projection normalises a token over batch and channels; it was used with one volume at a time, so this
    is the same, and no volume changes another one's tokens.
    """

    def forward(self, tok_BNE: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        return functional.layer_norm(tok_BNE.float(), tok_BNE.shape[-1:]).to(tok_BNE.dtype)


class EncoderTokens(nn.Module):
    """Tokens of the last map, and with ``two_sets`` those of the finer maps before them.

    Args:
        encoder: the image encoder; the norms of a projection are replaced.
        two_sets: see above.

    Raises:
        ValueError: ``two_sets`` with an encoder that has no projection.
    """

    def __init__(self, encoder: VisionEncoder, *, two_sets: bool = False) -> None:
        super().__init__()
        self.encoder, self.two_sets = encoder, two_sets
        self.finer = self._add_blocks(encoder) if two_sets else 0
        self.width = encoder.out_channels
        if self.projection is not None:
            self.projection.layer1[1], self.projection.layer2[1] = TokenNorm(), TokenNorm()

    @property
    def projection(self) -> ProjectionHead | None:
        """Swin-L's projection, a part of the encoder."""
        return self.encoder.proj_head if isinstance(self.encoder, SwinEncoder) else None

    def _add_blocks(self, encoder: VisionEncoder) -> int:
        """SwinUNETR's blocks on the finer maps; returns their channels, which the projection ends on."""
        if not isinstance(encoder, SwinEncoder) or encoder.proj_head is None:
            raise ValueError(f"image_tokens=two_sets needs encoder=swin_l, not {encoder.name}")
        width = sum(add_refining_blocks(self, encoder.stage_channels))
        if encoder.out_channels != width:  # a trial width; 768 as published
            encoder.proj_head = ProjectionHead(encoder.stage_channels[-1], width, width)
            encoder.proj_dims, encoder.out_channels = (width, width), width
        return width

    def count(self, size_dhw: Sequence[int]) -> int:
        """I for volumes of a size."""
        return math.prod(self.encoder.token_grid(size_dhw)) * (2 if self.two_sets else 1)

    def pooled(self, vol_B1DHW: Tensor) -> Tensor:
        """What is kept of volumes, ``[B, N, K]`` in D-major order."""
        if self.projection is None:
            return self.encoder.tokens(vol_B1DHW)
        maps = self.encoder.forward_features(vol_B1DHW, normalize=False)
        last = channel_norm(maps[-1])
        if not self.two_sets:
            return map_to_tokens(last)
        finer = refine(self, vol_B1DHW, [channel_norm(each) for each in maps[:3]])
        depth, height, width = last.shape[2:]
        kept = [functional.adaptive_avg_pool3d(each, (depth, height, width)) for each in finer]
        return map_to_tokens(torch.cat([*kept, last], dim=1))

    def arrange(self, kept_BNK: Tensor) -> Tensor:
        """Tokens ``[B, I, E]`` of what is kept: the finer maps' first, then the last map's, projected."""
        if self.projection is None:
            return kept_BNK
        last = self.projection(kept_BNK[..., self.finer :])
        return torch.cat([kept_BNK[..., : self.finer], last], dim=1) if self.two_sets else last
