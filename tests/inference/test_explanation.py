"""Maps of the fusion gates: a planted gate shows at its place, shifted passes fill finer cells, averages are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mg3d.datasets.report_text import ReportEncoding, SentenceEncoding
from mg3d.inference.explanation import (
    SentenceMaps,
    average_sentences,
    explain_report,
    peak_place,
    shift_plan,
    shift_volume,
    upsample_maps,
)
from mg3d.models.fusion import MLMCrossAttention
from tests.models.tiny_network import tiny_batch, tiny_network

WIDTH, STRIDE, LENGTH = 8, 4, 10


class BlockMeans(nn.Module):
    """Encoder whose token is the mean of its block in channel 0: what a token sees is known exactly."""

    stride = (STRIDE, STRIDE, STRIDE)

    def token_grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(edge // STRIDE for edge in size)

    def tokens(self, volume: Tensor) -> Tensor:
        means = nn.functional.avg_pool3d(volume, STRIDE).flatten(2).transpose(1, 2)
        return nn.functional.pad(means, (0, WIDTH - 1))


class Planted(nn.Module):
    """Network in which the second sentence's tokens meet bright image tokens, and nothing else meets anything."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = BlockMeans()
        layer = MLMCrossAttention(WIDTH, LENGTH, 8)
        with torch.no_grad():
            for part in (layer.query2, layer.key1):
                part.weight.copy_(torch.eye(WIDTH))
                part.bias.zero_()
        self.local_text_cross_multihead_attention = nn.ModuleList([layer])

    def project_image(self, tokens: Tensor) -> Tensor:
        return tokens

    def embed_text(self, ids: Tensor) -> Tensor:
        return nn.functional.pad((ids == 7).float()[..., None] * 12.0, (0, WIDTH - 1))

    def contextualize_text(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return embedded

    def project_text(self, hidden: Tensor) -> Tensor:
        return hidden


def report() -> ReportEncoding:
    """Two sentences of three tokens: words 5, 5, 5 and words 7, 7, 7."""
    ids = np.array([2, 5, 5, 5, 7, 7, 7, 3, 0, 0])
    index = np.array([-1, 1, 1, 1, 2, 2, 2, -1, -1, -1])
    sentences = [SentenceEncoding(text, []) for text in ("lungs are clear.", "nodule here.")]
    return ReportEncoding("", ids, (ids > 0).astype(np.int64), index, sentences)


def bright_block(cell: tuple[int, int, int], size: int = 16) -> Tensor:
    volume = torch.zeros(1, 1, size, size, size)
    z, y, x = (slice(STRIDE * index, STRIDE * (index + 1)) for index in cell)
    volume[0, 0, z, y, x] = 1.0
    return volume


def test_a_planted_gate_gives_a_map_at_its_place_and_only_for_its_sentence() -> None:
    maps = explain_report(Planted(), bright_block((3, 0, 2)), report())  # type: ignore[arg-type]
    assert maps.gates.shape == (2, 4, 4, 4) and maps.token_grid == (4, 4, 4)
    assert np.allclose(maps.gates[0], 0.5)
    assert np.unravel_index(maps.gates[1].argmax(), (4, 4, 4)) == (3, 0, 2)
    assert maps.gates[1, 3, 0, 2] == pytest.approx(1 / (1 + np.exp(-12 / np.sqrt(WIDTH))), abs=1e-6)
    assert (np.delete(maps.gates[1].ravel(), 3 * 16 + 2) == 0.5).all()
    assert peak_place(maps.relative()[1]) == (3.5 / 4, 0.5 / 4, 2.5 / 4)
    assert not maps.flat and maps.spread()[0] == 0
    enlarged = upsample_maps(maps.relative(), (16, 16, 16))
    z, y, x = np.unravel_index(enlarged[1].argmax(), (16, 16, 16))
    assert 12 <= z < 16 and 0 <= y < 4 and 8 <= x < 12


def test_shifted_passes_place_what_lies_between_two_tokens() -> None:
    volume = torch.zeros(1, 1, 16, 16, 16)
    volume[0, 0, 6:10, 0:4, 10:14] = 1.0  # centred at (8, 2, 12): on the border of two tokens along z and along x
    maps = explain_report(Planted(), volume, report(), shifts=2)  # type: ignore[arg-type]
    assert maps.gates.shape == (2, 8, 8, 8) and maps.token_grid == (4, 4, 4)
    shown = maps.placed()[1]
    mass = np.clip(shown - np.median(shown), 0, None)
    axes = np.indices(mass.shape) * 2 + 1
    centre = [(mass * axis).sum() / mass.sum() for axis in axes]
    assert np.allclose(centre, (8, 2, 12), atol=0.8)


def test_shifting_moves_content_and_covers_every_place_once() -> None:
    assert shift_plan((4, 4, 4), 1) == ([0], [0], [0])
    assert shift_plan((32, 8, 16), 2) == ([8, -8], [2, -2], [4, -4])
    assert shift_plan((32, 32, 32), 4)[0] == [12, 4, -4, -12]
    line = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert shift_volume(line, (2, 0, 0)).flatten().tolist() == [0, 0, 0, 1, 2]
    assert shift_volume(line, (-1, 0, 0)).flatten().tolist() == [1, 2, 3, 4, 4]
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="shifts"):
            shift_plan((32, 32, 32), wrong)


def test_an_average_counts_the_tokens_of_its_sentence_alone() -> None:
    gates = torch.rand(1, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([-1, 1, 2, 2, 2, -1])
    found = average_sentences(gates, index, 2)
    assert torch.allclose(found[0, :, 0], gates[0, :, :, 1])
    assert torch.allclose(found[0, :, 1], gates[0, :, :, 2:5].mean(-1))


def test_maps_of_the_real_network_are_the_gates_of_its_fusion() -> None:
    network = tiny_network().eval()
    batch = tiny_batch((3,))
    sentences = [SentenceEncoding(str(number), []) for number in range(3)]
    arrays = [batch[key][0].numpy() for key in ("text_ids", "text_masks", "sentence_index")]
    volume = batch["image"].transpose(1, 2)
    maps = explain_report(network, volume, ReportEncoding("", *arrays, sentences))
    assert maps.layers.shape == (2, 3, *network.token_grid)
    encoded = network.encode(batch)
    with torch.no_grad():
        layer = network.local_text_cross_multihead_attention[0]
        first = layer(encoded.text, encoded.image)[3]  # [1, N, L]
    tokens = batch["sentence_index"][0] == 2
    assert np.allclose(maps.layers[0, 1].ravel(), first[0][:, tokens].mean(1).numpy(), atol=1e-6)
    finer = explain_report(network, volume, ReportEncoding("", *arrays, sentences), shifts=2)
    assert finer.gates.shape == (3, *(2 * cells for cells in network.token_grid))
    assert np.isfinite(finer.gates).all()


def test_contrasts_take_away_what_sentences_and_places_share() -> None:
    rng = np.random.default_rng(0)
    maps = SentenceMaps(("a", "b", "c"), rng.random((2, 3, 2, 2, 2)).astype(np.float32), (2, 2, 2))
    assert np.allclose(maps.relative().mean(axis=0), 0, atol=1e-6)
    assert np.allclose(maps.placed().mean(axis=(1, 2, 3)), 0, atol=1e-6)
    even = SentenceMaps(("a",), np.full((1, 1, 2, 2, 2), 0.4, np.float32), (2, 2, 2))
    assert even.flat and even.relative().max() == 0


def test_a_report_without_sentences_is_refused() -> None:
    empty = ReportEncoding("", *(np.zeros(LENGTH, np.int64) for _ in range(3)), [], False)
    with pytest.raises(ValueError, match="no sentence"):
        explain_report(Planted(), bright_block((0, 0, 0)), empty)  # type: ignore[arg-type]
