"""Whole volumes through a network that sees windows: overlap, blending, flips, several networks.

Shape suffixes: B batch, K classes with background, X/Y/Z volume axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor
from torch.nn import functional

from mg3d.errors import ConfigError

__all__ = ["FLIPS", "WindowOptions", "predict_probabilities"]

FLIPS: tuple[tuple[int, ...], ...] = tuple(axes for count in range(4) for axes in combinations((2, 3, 4), count))
"""The eight views of ``tta``: axes of ``[B, 1, X, Y, Z]`` that are turned round."""

STITCH_ON_CPU_BYTES = 2**31
"""Logits of a volume beyond this size are put together in the main memory instead of the accelerator's."""

_SLAB = 16
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WindowOptions:
    """How a volume is covered.

    Attributes:
        roi: voxels of a window; smaller volumes are padded with zeros.
        overlap: of neighbouring windows, in [0, 1).
        blending: ``constant`` or ``gaussian`` (sigma an eighth of the window).
        batch_size: windows a forward pass.
        flips: views whose probabilities are averaged, see `FLIPS`.
        vote: voxel-wise majority of the views and networks instead of the mean of their probabilities (published).
    """

    roi: tuple[int, int, int]
    overlap: float = 0.5
    blending: str = "constant"
    batch_size: int = 2
    flips: tuple[tuple[int, ...], ...] = FLIPS[:1]
    vote: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1 or self.blending not in ("constant", "gaussian"):
            raise ConfigError(
                f"overlap={self.overlap}, blending={self.blending!r}",
                "overlap lies in [0, 1), blending is constant or gaussian",
            )


@torch.no_grad()
def predict_probabilities(networks: Sequence[Network], vol_11XYZ: Tensor, options: WindowOptions) -> Tensor:
    """Class probabilities of a whole volume.

    Logits of overlapping windows are blended, then turned into probabilities; these are averaged over views and
    networks with one running sum, so that memory does not grow with their number. With ``vote`` each of them gives one
    vote to its best class; the largest share then wins, the lower class when shares are equal.

    Args:
        networks: windows ``[B, 1, X, Y, Z]`` -> logits ``[B, K, X, Y, Z]``.
        vol_11XYZ: the volume, on the device of the networks.
        options: windows, views and how they are combined.

    Returns:
        float32 ``[K, X, Y, Z]`` that sum to 1, on the device where they were put together.

    Raises:
        ValueError: no network.
    """
    if not networks:
        raise ValueError("predict_probabilities needs at least one network")
    total: Tensor | None = None
    for network in networks:
        for axes in options.flips:
            found = _one_view(network, vol_11XYZ, axes, options)
            total = found if total is None else total.add_(found)
    if total is None:
        raise ValueError("options.flips is empty: keep at least the plain view ()")
    count = len(networks) * len(options.flips)
    return total if count == 1 else total.div_(count)


def _one_view(network: Network, vol_11XYZ: Tensor, axes: tuple[int, ...], options: WindowOptions) -> Tensor:
    found = _blended_logits(network, torch.flip(vol_11XYZ, axes) if axes else vol_11XYZ, options)
    for slab in found.split(_SLAB, dim=2):  # in place: a second copy of all classes would be the largest array
        if options.vote:
            slab.copy_(functional.one_hot(slab.argmax(dim=1), slab.shape[1]).movedim(-1, 1))
        else:
            slab.copy_(torch.softmax(slab, dim=1))
    return (torch.flip(found, axes) if axes else found)[0]


def _blended_logits(network: Network, vol_11XYZ: Tensor, options: WindowOptions) -> Tensor:
    def predictor(windows: Tensor) -> Tensor:
        return network(windows).float()

    device = vol_11XYZ.device
    large = vol_11XYZ.numel() * vol_11XYZ.element_size() * 4 > STITCH_ON_CPU_BYTES
    found = sliding_window_inference(
        vol_11XYZ.float(),
        options.roi,
        options.batch_size,
        predictor,
        overlap=options.overlap,
        mode=options.blending,
        sw_device=device,
        device=torch.device("cpu") if large else device,
    )
    if not isinstance(found, Tensor):
        raise TypeError(f"the network returned {type(found).__name__}, expected one tensor of logits")
    return found
