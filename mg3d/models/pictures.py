"""Pictures of what the network does with a batch, for TensorBoard.

Shape legend: D/H/W volume axes, S sentences of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mg3d.models.losses import cosine_matrix
from mg3d.models.network import MG3DNetwork
from mg3d.models.objectives.local_contrast import LocalContrast
from mg3d.models.objectives.masked_image import MaskedImage

CELL_PIXELS = 8
LARGEST_MATRIX = 64


@torch.no_grad()
def draw(net: MG3DNetwork, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Pictures [rows, columns] with values in [0, 1] for the active objectives.

    ``reconstruction/axial`` and ``reconstruction/coronal``: middle slice of the first study, original | masked |
    rebuilt. ``sentence_similarity/image`` and ``sentence_similarity/text``: cosines between the sentences of the batch
    (at most 64), -1 black and 1 white, in what the image says to them and in their text.

    Args:
        net: the network, in the mode it should run in.
        batch: output of the collate function.
    """
    encoded = net.encode(batch)
    pictures: dict[str, Tensor] = {}
    for objective in net.objectives:
        if isinstance(objective, MaskedImage):
            rebuilt = objective.reconstruct(net, encoded)
            volumes = [each[0, 0].float().clamp(0, 1) for each in (encoded.volume, encoded.masked_volume, rebuilt)]
            depth, height, _ = volumes[0].shape
            pictures["reconstruction/axial"] = torch.cat([each[depth // 2] for each in volumes], dim=1)
            pictures["reconstruction/coronal"] = torch.cat([each[:, height // 2].flip(0) for each in volumes], dim=1)
        elif isinstance(objective, LocalContrast) and bool(encoded.has_text.any()):
            found = objective.features(net, encoded)
            pictures["sentence_similarity/image"] = _matrix(found.visual_sentences[found.mask])
            pictures["sentence_similarity/text"] = _matrix(encoded.sentence_targets[found.mask])
    return pictures


def _matrix(rows_SF: Tensor) -> Tensor:
    rows = rows_SF[:LARGEST_MATRIX]
    grey = (cosine_matrix(rows, rows) + 1.0) / 2.0
    return functional.interpolate(grey[None, None], scale_factor=CELL_PIXELS, mode="nearest")[0, 0].clamp(0, 1)
