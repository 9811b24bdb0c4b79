"""Heads of classification on a pooled feature vector, and what an encoder needs to serve them (spec downstream 4-6).

Axes: B batch, N tokens, E token width, F pooled features, K outputs.

| head | pooled vector | head on it |
|---|---|---|
| linear | mean of the raw last map | Linear; UNet encoders: Linear F -> 1024, ReLU, Linear |
| norm_linear | mean of the raw last map | LayerNorm, Linear |
| mlp_linear | mean of the projected, channel-normalised tokens (Swin) | LayerNorm, Linear |
| decoder_gap | mean of the segmentation decoder's map at full resolution | Linear (the decoder's 1 x 1 x 1 output) |

A prediction depends on its own image alone: where the published networks normalise with the statistics of the batch
even in evaluation, running statistics take their place, unless ``protocol=reference``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mg3d.errors import ConfigError
from mg3d.models.vision_encoders.base import VisionEncoder, channel_norm
from mg3d.models.vision_encoders.swin import ProjectionHead, SwinEncoder, TokenPositionNorm
from mg3d.models.vision_encoders.unet import AlwaysBatchNorm3d, UNetEncoder

__all__ = ["HEADS", "build_head", "encoder_features", "fit_encoder", "pooled_features", "use_running_statistics"]

HEADS = ("linear", "norm_linear", "mlp_linear", "decoder_gap")
PROJECTED_WIDTH = 768
UNET_HIDDEN = 1024


class RunningTokenNorm(nn.BatchNorm1d):
    """Normalise every token position over batch and channels in training, with running statistics in evaluation.

    Args:
        num_tokens: N, tokens of the volumes.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens, affine=False)

    def forward(self, tok_BNE: Tensor) -> Tensor:
        """Return normalised tokens ``[B, N, E]`` of the same type."""
        return super().forward(tok_BNE.float()).to(tok_BNE.dtype)


def build_head(kind: str, width: int, num_outputs: int, *, unet: bool = False) -> nn.Module:
    """Build the layers from pooled features ``[B, F]`` to logits ``[B, K]``.

    Args:
        kind: one of `HEADS` but ``decoder_gap``.
        width: F.
        num_outputs: K.
        unet: the encoder is a UNet, whose linear head has a hidden layer as published.

    """
    if kind in ("norm_linear", "mlp_linear"):
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_outputs))
    if kind == "linear" and unet:
        return nn.Sequential(nn.Linear(width, UNET_HIDDEN), nn.ReLU(), nn.Linear(UNET_HIDDEN, num_outputs))
    return nn.Sequential(nn.Linear(width, num_outputs))


def fit_encoder(encoder: VisionEncoder, kind: str, size_dhw: Sequence[int], *, reference: bool) -> None:
    """Give an encoder the projection that a head needs, or take it away, and make it independent of the batch.

    Args:
        encoder: changed in place; load weights afterwards.
        kind: one of `HEADS`.
        size_dhw: voxels of the volumes, in the order the network sees.
        reference: keep the published statistics of the batch.

    Raises:
        ConfigError: unknown head, or ``mlp_linear`` on an encoder other than Swin.
    """
    if kind not in HEADS:
        raise ConfigError(f"head={kind!r} is unknown", f"choose one of {', '.join(HEADS)}")
    if isinstance(encoder, SwinEncoder):
        _set_projection(encoder, wanted=kind == "mlp_linear")
    elif kind == "mlp_linear":
        raise ConfigError(
            f"head={kind} needs a Swin encoder, not {encoder.name}", "choose encoder=swin_b or swin_l, or head=linear"
        )
    if not reference:
        use_running_statistics(encoder, size_dhw)


def use_running_statistics(encoder: VisionEncoder, size_dhw: Sequence[int]) -> None:
    """Replace every norm that takes the statistics of the batch in evaluation by one with running statistics.

    Args:
        encoder: changed in place; names and shapes of stored weights stay.
        size_dhw: voxels of the volumes.
    """
    if isinstance(encoder, UNetEncoder):
        for part in encoder.modules():
            if isinstance(part, AlwaysBatchNorm3d):
                part.__class__ = nn.BatchNorm3d  # type: ignore[assignment]  # the same parameters and buffers
    if isinstance(encoder, SwinEncoder) and encoder.proj_head is not None:
        num_tokens = math.prod(encoder.token_grid(size_dhw))
        for layer in (encoder.proj_head.layer1, encoder.proj_head.layer2):
            if isinstance(layer[1], TokenPositionNorm):
                layer[1] = RunningTokenNorm(num_tokens)


def _set_projection(encoder: SwinEncoder, *, wanted: bool) -> None:
    width = encoder.stage_channels[-1]
    if wanted and encoder.proj_head is None:
        encoder.proj_head = ProjectionHead(width, PROJECTED_WIDTH, PROJECTED_WIDTH)
        encoder.proj_dims, encoder.out_channels = (PROJECTED_WIDTH, PROJECTED_WIDTH), PROJECTED_WIDTH
    elif not wanted and encoder.proj_head is not None:
        encoder.proj_head, encoder.proj_dims, encoder.out_channels = None, (), width


def pooled_features(encoder: VisionEncoder, vol_B1DHW: Tensor) -> Tensor:
    """Pooled vector ``[B, F]`` that a head reads: mean of the projected tokens, else of the raw last map."""
    if getattr(encoder, "proj_head", None) is not None:
        return encoder.tokens(vol_B1DHW).mean(dim=1)
    return encoder.forward_features(vol_B1DHW, normalize=False)[-1].mean(dim=(2, 3, 4))


@torch.no_grad()
def encoder_features(encoder: VisionEncoder, vol_B1DHW: Tensor) -> Tensor:
    """Frozen features ``[B, F]`` for the probes: the mean token before any projection head.

    For Swin the tokens are channel-normalised, as in pre-training; the other encoders' are taken as they are.
    """
    map_BEDHW = encoder.forward_features(vol_B1DHW, normalize=False)[-1]
    if isinstance(encoder, SwinEncoder):
        map_BEDHW = channel_norm(map_BEDHW)
    return map_BEDHW.float().mean(dim=(2, 3, 4))
