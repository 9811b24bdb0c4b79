"""What every image encoder of the project offers.

Shape suffixes: B batch, C channels, D/H/W volume axes (z, y, x), N image tokens, E token width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class VisionEncoder(nn.Module, ABC):
    """A 3D encoder that turns one-channel volumes into a short sequence of tokens.

    Attributes:
        name: registry name.
        out_channels: width E of the tokens.
        stride: voxels per token along D, H and W.
        stage_channels: channels of the feature maps of :meth:`forward_features`, finest first.
    """

    name: str
    out_channels: int
    stride: tuple[int, int, int]
    stage_channels: tuple[int, ...]

    @abstractmethod
    def forward_features(self, vol_B1DHW: Tensor, normalize: bool = True) -> list[Tensor]:
        """Compute the feature maps of all stages.

        Args:
            vol_B1DHW: volumes in [0, 1]; any size, each axis is zero-padded at its end as far as needed.
            normalize: pass every map through a channel LayerNorm without parameters.

        Returns:
            Feature maps ``[B, C_k, D_k, H_k, W_k]``, finest first.
        """

    @abstractmethod
    def tokens(self, vol_B1DHW: Tensor) -> Tensor:
        """Encode volumes to tokens ``[B, N, E]`` in D-major order: index (d * H' + h) * W' + w."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Describe the architecture in plain types, as stored beside the weights; see ``encoder_from_metadata``."""

    def pool(self, vol_B1DHW: Tensor) -> Tensor:
        """Encode volumes to one vector each, ``[B, E]``: the mean of their tokens."""
        return self.tokens(vol_B1DHW).mean(dim=1)

    def compile_features(self) -> None:
        """Compute features through ``torch.compile`` from now on, at the first call of every new size.

        Parameters keep their names. What runs outside the graph stays as it is: Swin's window attention, and on a CPU
        the whole of its blocks.
        """
        self.forward_features = torch.compile(self.forward_features)  # type: ignore[method-assign]

    def parameter_count(self) -> int:
        """Number of trainable and frozen weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, vol_B1DHW: Tensor, normalize: bool = True) -> list[Tensor]:
        """Same as :meth:`forward_features`, so that decoders can use the encoder as a plain backbone."""
        return self.forward_features(vol_B1DHW, normalize)

    def token_grid(self, size_dhw: Sequence[int]) -> tuple[int, int, int]:
        """Number of tokens along D, H and W for a volume of ``size_dhw`` voxels."""
        d, h, w = (math.ceil(size / stride) for size, stride in zip(size_dhw, self.stride, strict=True))
        return d, h, w


def channel_norm(map_BCDHW: Tensor) -> Tensor:
    """LayerNorm over the channels of a feature map, without parameters (eps 1e-5)."""
    last = map_BCDHW.movedim(1, -1)
    return functional.layer_norm(last, [last.shape[-1]]).movedim(-1, 1)


def map_to_tokens(map_BEDHW: Tensor) -> Tensor:
    """Flatten a feature map to tokens ``[B, N, E]`` in D-major order."""
    return map_BEDHW.flatten(2).transpose(1, 2)


def pad_to_multiple(vol_B1DHW: Tensor, stride: Sequence[int]) -> Tensor:
    """Append zeros to each axis until its size is a multiple of ``stride``."""
    missing = [-size % step for size, step in zip(vol_B1DHW.shape[2:], stride, strict=True)]
    if not any(missing):
        return vol_B1DHW
    return functional.pad(vol_B1DHW, (0, missing[2], 0, missing[1], 0, missing[0]))


def check_volume(vol_B1DHW: Tensor) -> None:
    """Refuse anything that is not a batch of one-channel floating-point volumes.

    Raises:
        ValueError: wrong number of axes or channels.
        TypeError: not a floating-point tensor.
    """
    if vol_B1DHW.dim() != 5 or vol_B1DHW.shape[1] != 1:
        raise ValueError(f"expected volumes [B, 1, D, H, W], got shape {tuple(vol_B1DHW.shape)}")
    if not torch.is_floating_point(vol_B1DHW):
        raise TypeError(f"expected floating-point volumes in [0, 1], got {vol_B1DHW.dtype}")
