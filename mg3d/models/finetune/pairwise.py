"""Scores of every report with every volume through the gated cross-attention, without running it for every pair.

With one text a pair, gates are scalars: every value inside the attention is a sum of few vectors that depend on the
text alone or on the volume alone, each times a scalar of the pair. So the vectors are computed once, and a pair costs
inner products. The result equals `VocabularyNetwork.latents` on every pair up to rounding.

Axes: N texts, K volumes, I image tokens, C channels, P latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.finetune.vocabulary import VocabularyNetwork
from mg3d.models.fusion import MIMCrossAttention

__all__ = ["naive_scores", "pairwise_scores"]

TEXTS_AT_ONCE = 512
VOLUMES_AT_ONCE = 32


@dataclass(frozen=True)
class _Sum:
    """A value of every pair as a sum of vectors times scalars.

    Attributes:
        vectors: of texts ``[N or 1, C]``, or of volumes ``[K or 1, I or 1, C]``.
        scales: for each vector ``[N, K, 1]`` (texts) or ``[N, K, I]`` (volumes); None is 1.
    """

    vectors: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]

    def through(self, linear: nn.Linear) -> _Sum:
        """The value after a linear layer."""
        vectors = tuple(functional.linear(vector, linear.weight) for vector in self.vectors)
        if linear.bias is None:
            return _Sum(vectors, self.scales)
        bias = linear.bias.view(*[1] * (vectors[0].ndim - 1), -1)
        if None in self.scales:  # of equal scale: one vector fewer
            place = self.scales.index(None)
            return _Sum((*vectors[:place], vectors[place] + bias, *vectors[place + 1 :]), self.scales)
        return _Sum((*vectors, bias), (*self.scales, None))

    def times(self, scale: Tensor) -> _Sum:
        """The value times a scalar of the pair (and token)."""
        return _Sum(self.vectors, tuple(scale if each is None else each * scale for each in self.scales))


def _gates(text: _Sum, image: _Sum) -> Tensor:
    """Sigmoid gates ``[N, K, I]`` of the scaled inner products."""
    total: Tensor | None = None
    for text_NC, text_scale in zip(text.vectors, text.scales, strict=True):
        for image_KIC, image_scale in zip(image.vectors, image.scales, strict=True):
            volumes, tokens, width = image_KIC.shape
            term = (text_NC @ image_KIC.reshape(-1, width).t()).view(len(text_NC), volumes, tokens)
            for scale in (text_scale, image_scale):
                term = term if scale is None else term * scale
            total = term if total is None else total + term
    if total is None:
        raise ValueError("a sum without vectors")
    return torch.sigmoid(total * text.vectors[0].shape[-1] ** -0.5)


def _through_layer(layer: MIMCrossAttention, text: _Sum, image: _Sum) -> tuple[_Sum, _Sum]:
    """Texts and volumes after one cross-attention layer.

    The attention pool over a single row returns that row, projected: mean and row are the same.
    """
    for_text = _gates(text.through(layer.query2), image.through(layer.key1))
    for_image = _gates(text.through(layer.key2), image.through(layer.query1))
    new_text = text.through(layer.value2).times(for_text.mean(dim=2, keepdim=True))
    pooled = image.through(layer.value1).times(for_image).through(layer.fc2.v_proj).through(layer.fc2.c_proj)
    return new_text, pooled


def _visual_latents(network: VocabularyNetwork, image: _Sum, texts: int, volumes: int) -> Tensor:
    """Latents ``[N, K, P]`` of volumes seen with every text."""
    tokens, latent = network.tokens, network.options.latent
    weight_PIC = network.to_visual_latent.weight.view(latent, tokens, -1)
    found = image.vectors[0].new_zeros(texts, volumes, latent)
    for image_KIC, scale in zip(image.vectors, image.scales, strict=True):
        blocks = torch.einsum("kic,pic->kip", image_KIC.expand(-1, tokens, -1), weight_PIC)
        if scale is None:
            found = found + blocks.sum(dim=1)
        else:
            found = found + torch.einsum("nki,kip->nkp", scale, blocks.expand(volumes, -1, -1))
    return found


def _text_latents(network: VocabularyNetwork, text: _Sum) -> Tensor:
    total: Tensor | float = 0.0
    for text_NC, scale in zip(text.vectors, text.scales, strict=True):
        projected = network.to_text_latent(text_NC).unsqueeze(1)
        total = total + (projected if scale is None else projected * scale)
    return torch.as_tensor(total)


def _block(network: VocabularyNetwork, text_NC: Tensor, image_KIC: Tensor) -> Tensor:
    text, image = _Sum((text_NC,), (None,)), _Sum((image_KIC,), (None,))
    if network.options.fusion == "gated":
        for layer in network.local_img_cross_multihead_attention:
            text, image = _through_layer(layer, text, image)  # type: ignore[arg-type]
    image_NKP = _visual_latents(network, image, len(text_NC), len(image_KIC))
    text_NKP = _text_latents(network, text)
    return (functional.normalize(text_NKP, dim=-1) * functional.normalize(image_NKP, dim=-1)).sum(dim=-1)


@torch.no_grad()
def pairwise_scores(network: VocabularyNetwork, text_NF: Tensor, image_KIE: Tensor) -> Tensor:
    """Cosine of text and volume after their own cross-attention, for every pair.

    Args:
        network: in evaluation mode.
        text_NF: text features.
        image_KIE: image features.

    Returns:
        ``[N, K]`` on the device of the network.
    """
    device = network.temperature.device
    texts = network.project_text(text_NF.to(device))
    if network.options.fusion == "none":
        parts = [network.image_latents(part.to(device), part) for part in image_KIE.split(VOLUMES_AT_ONCE)]
        return network.text_latents(text_NF.to(device)) @ torch.cat(parts).t()
    columns = []
    for part in image_KIE.split(VOLUMES_AT_ONCE):
        image = network.project_image(part.to(device))
        columns.append(torch.cat([_block(network, text, image) for text in texts.split(TEXTS_AT_ONCE)]))
    return torch.cat(columns, dim=1)


@torch.no_grad()
def naive_scores(network: VocabularyNetwork, text_NF: Tensor, image_KIE: Tensor) -> Tensor:
    """The same by running the attention for one pair after the other; a reference for tests and benchmarks."""
    rows = []
    for text_F in text_NF:
        row = []
        for image_IE in image_KIE:
            text, image = network.project_text(text_F[None, None]), network.project_image(image_IE[None])
            image_BP, text_BTP = network.latents(image, text)
            row.append((image_BP * text_BTP[:, 0]).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)
