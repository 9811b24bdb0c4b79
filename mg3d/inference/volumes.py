"""Batches of volumes before the encoder, and one row out of the crops of a scan after it.

B volumes, V crops of one scan, D/H/W volume axes, N image tokens, E encoder width, P shared space.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mg3d.errors import DataError

TOLERANCE = 1e-3
MAKE_VOLUMES = "make volumes of a scan with load_processor(...)(scan).volumes"


def pool_crops(found: Tensor, output: str) -> Tensor:
    """One row from the V volumes of a scan.

    Args:
        found: ``embedding`` [V, P], ``pooled`` [V, E] or ``tokens`` [V, N, E].
        output: which of them.

    Returns:
        Mean unit vector [1, P] (unit length), mean [1, E], or all tokens [1, V * N, E].
    """
    if output == "tokens":
        return found.flatten(0, 1)[None]
    mean = found.mean(dim=0, keepdim=True)
    return functional.normalize(mean, dim=-1) if output == "embedding" and len(found) > 1 else mean


def check_volumes(volumes: Tensor | np.ndarray) -> Tensor:
    """Refuse what is no batch of volumes in [0, 1].

    Args:
        volumes: [B, 1, D, H, W].

    Returns:
        The same as a float32 tensor.

    Raises:
        DataError: other shape or type, values that are not finite or outside of [0, 1].
    """
    batch = torch.as_tensor(volumes)
    if batch.dim() != 5 or batch.shape[1] != 1 or not len(batch):
        raise DataError(f"expected volumes [B, 1, D, H, W], got shape {tuple(batch.shape)}", MAKE_VOLUMES)
    if not batch.is_floating_point():
        raise DataError(f"expected floating-point volumes in [0, 1], got {batch.dtype}", MAKE_VOLUMES)
    batch = batch.float()
    low, high = float(batch.min()), float(batch.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also NaN
        raise DataError(f"values from {low:g} to {high:g} are not in [0, 1]", MAKE_VOLUMES)
    return batch
