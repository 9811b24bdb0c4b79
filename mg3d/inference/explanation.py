"""Where a sentence of the report and the scan meet: maps of the fusion gates over the volume.

The text cross attention of the fusion multiplies every image token with sigmoid gates, one per report token
(:mod:`mg3d.models.fusion`). Averaged over the tokens of a sentence and over the layers, these gates are one number per
image token and sentence. They say how strongly the model mixes the two, not where a finding is: nothing in the training
asks a gate to point at a lesion.

Legend: K layers, S sentences, N image tokens, D', H', W' grid of the map, E encoder width, C hidden, L report tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from mg3d.datasets.report_text import ReportEncoding
    from mg3d.models.network import MG3DNetwork

FLAT_SPREAD = 0.02
"""Gates that differ by less than this over the whole scan say nothing a reader should look at."""


@dataclass(frozen=True)
class SentenceMaps:
    """Gates of every sentence on a grid that divides the volume into equal cells.

    Attributes:
        sentences: the S sentences as the model read them.
        layers: float32 gates in (0, 1), [K, S, D', H', W'].
        token_grid: cells (D, H, W) that one pass of the network tells apart.
    """

    sentences: tuple[str, ...]
    layers: np.ndarray
    token_grid: tuple[int, int, int]

    @property
    def gates(self) -> np.ndarray:
        """Mean over the layers [S, D', H', W']."""
        return self.layers.mean(axis=0)

    def relative(self) -> np.ndarray:
        """Gates minus their mean over all sentences at the same place [S, D', H', W']."""
        return self.gates - self.gates.mean(axis=0)

    def placed(self) -> np.ndarray:
        """As :meth:`relative`, minus the mean of each sentence over the scan: only the pattern in space is left."""
        relative = self.relative()
        return relative - relative.mean(axis=(1, 2, 3), keepdims=True)

    def spread(self) -> np.ndarray:
        """Largest minus smallest gate of each sentence over the scan [S]."""
        flat = self.gates.reshape(len(self.sentences), -1)
        return flat.max(axis=1) - flat.min(axis=1)

    @property
    def flat(self) -> bool:
        """Whether no sentence's gates vary over the scan by more than :data:`FLAT_SPREAD`."""
        return bool(self.spread().max(initial=0.0) < FLAT_SPREAD)


def report_gates(network: MG3DNetwork, image_BNC: Tensor, text_BLC: Tensor) -> Tensor:
    """Gates P1 [B, K, N, L] by which report tokens scale image tokens, layer by layer of the text cross attention.

    Args:
        network: holds the fusion layers.
        image_BNC: projected image tokens.
        text_BLC: projected report tokens, padding included (it takes part in the fusion, as in training).
    """
    found = []
    for layer in network.local_text_cross_multihead_attention:
        text_BLC, _, image_BNC, gates_BNL = layer(text_BLC, image_BNC)
        found.append(gates_BNL)
    return torch.stack(found, dim=1)


def average_sentences(gates_BKNL: Tensor, index_L: Tensor, count: int) -> Tensor:
    """Mean of the gates over the tokens of each sentence, [B, K, S, N].

    Args:
        gates_BKNL: gates of every report token.
        index_L: 1-based sentence of every token, below 1 = none.
        count: number of sentences S; each must own a token.
    """
    member_LS = index_L[:, None] == torch.arange(1, count + 1, device=index_L.device)
    weight_LS = member_LS.to(gates_BKNL.dtype) / member_LS.sum(dim=0)
    return (gates_BKNL @ weight_LS).transpose(2, 3)


@torch.no_grad()
def explain_report(
    network: MG3DNetwork,
    volume_11DHW: Tensor,
    report: ReportEncoding,
    *,
    shifts: int = 1,
    progress: Callable[[Iterator[tuple[int, int, int]], int], Iterator[tuple[int, int, int]]] | None = None,
) -> SentenceMaps:
    """Maps of the gates between a volume and every sentence of a report.

    One pass has as many cells as image tokens, which is coarse. With ``shifts`` n the volume is moved by fractions of a
    token along every axis and encoded n^3 times; each pass fills other cells of a grid n times as fine per axis. A
    cell then holds the gate of a token centred there; a token still sees far more than its cell.

    Args:
        network: in evaluation mode.
        volume_11DHW: one volume in [0, 1], as prepared for the network.
        report: from :func:`mg3d.datasets.report_text.encode_report`.
        shifts: n, positions per token and axis; the encoder's strides must be multiples of 2 n when above 1.
        progress: wraps the list of the passes, given also their number (a progress bar).

    Returns:
        The maps, on a grid of n times the token grid.

    Raises:
        ValueError: the report has no sentence, or ``shifts`` does not fit the encoder's stride.
    """
    if not report.sentences:
        raise ValueError("the report holds no sentence that the model can read")
    grid = network.vision_encoder.token_grid(volume_11DHW.shape[2:])
    moves = shift_plan(network.vision_encoder.stride, shifts)
    text_1LC = _project_report(network, report, volume_11DHW.device)
    index_L = torch.from_numpy(report.sentence_index).to(volume_11DHW.device)
    count, layers = len(report.sentences), len(network.local_text_cross_multihead_attention)
    maps = np.empty((layers, count, *(cells * shifts for cells in grid)), dtype=np.float32)
    places: Iterator[tuple[int, int, int]] = itertools.product(range(shifts), repeat=3)  # type: ignore[assignment]
    for place in progress(places, shifts**3) if progress else places:
        moved = shift_volume(volume_11DHW, [moves[axis][step] for axis, step in enumerate(place)])
        image_1NC = network.project_image(network.vision_encoder.tokens(moved))
        gates_1KSN = average_sentences(report_gates(network, image_1NC, text_1LC), index_L, count)
        cells = (slice(step, None, shifts) for step in place)
        maps[(slice(None), slice(None), *cells)] = gates_1KSN[0].unflatten(-1, grid).float().cpu().numpy()
    return SentenceMaps(tuple(sentence.text for sentence in report.sentences), maps, grid)


def _project_report(network: MG3DNetwork, report: ReportEncoding, device: torch.device) -> Tensor:
    ids, mask = (torch.from_numpy(array)[None].to(device) for array in (report.input_ids, report.attention_mask))
    return network.project_text(network.contextualize_text(network.embed_text(ids), mask))


def shift_plan(stride: Sequence[int], shifts: int) -> tuple[list[int], ...]:
    """Voxels by which the content moves along each axis so that place k of every token is seen by its centre.

    Args:
        stride: voxels per token along D, H and W.
        shifts: n, places per token and axis.

    Returns:
        per axis n moves, first the one for the first place; symmetric about 0.

    Raises:
        ValueError: n below 1, or a stride that is no multiple of 2 n.
    """
    if shifts == 1:
        return ([0],) * 3
    if shifts < 1 or any(size % (2 * shifts) for size in stride):
        raise ValueError(f"shifts={shifts} does not fit strides of {tuple(stride)} voxels: use 1, 2 or 4")
    # with n places, the centre of place k lies (2 k + 1 - n) / (2 n) tokens behind the centre of the token
    return tuple([-(2 * k + 1 - shifts) * size // (2 * shifts) for k in range(shifts)] for size in stride)


def shift_volume(volume_11DHW: Tensor, moves: Sequence[int]) -> Tensor:
    """Move the content by whole voxels along D, H and W; what comes in repeats the border."""
    for axis, move in enumerate(moves, start=2):
        size = volume_11DHW.shape[axis]
        source = (torch.arange(size, device=volume_11DHW.device) - move).clamp(0, size - 1)
        volume_11DHW = volume_11DHW.index_select(axis, source)
    return volume_11DHW


def upsample_maps(maps: np.ndarray, size_dhw: Sequence[int], *, smooth: bool = True) -> np.ndarray:
    """Enlarge maps [S, D', H', W'] to a grid over the same volume, trilinear between cell centres or cell by cell."""
    values = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32))[:, None]
    if smooth:
        enlarged = functional.interpolate(values, tuple(size_dhw), mode="trilinear", align_corners=False)
    else:
        enlarged = functional.interpolate(values, tuple(size_dhw), mode="nearest-exact")
    return enlarged[:, 0].numpy()


def peak_place(values: np.ndarray) -> tuple[float, float, float]:
    """Centre of the cell with the largest value of a map [D', H', W'], as shares (z, y, x) of the volume in (0, 1)."""
    cell = np.unravel_index(int(np.argmax(values)), values.shape)
    z, y, x = ((index + 0.5) / size for index, size in zip(cell, values.shape, strict=True))
    return float(z), float(y), float(x)
