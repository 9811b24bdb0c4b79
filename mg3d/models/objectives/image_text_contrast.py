"""Dual-encoder image-text contrast: volume and report meet in one shared space, without fusion.

This is what retrieval and zero-shot classification need. (CML compares pairs that both contain the text, so it can be
solved without looking at the image.) InfoNCE as in CLIP (Radford et al. 2021), symmetric, with fixed temperature.

Shape legend: B batch, N image tokens, L text tokens, S sentences, n tokens of one, E encoder width, P shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mg3d.models.distributed import gather_features
from mg3d.models.heads import unit_rows
from mg3d.models.objectives.contrast import build_queue, contrast, remember, remembered_keys, same_report_pairs
from mg3d.models.options import NetworkOptions
from mg3d.models.pooling import masked_mean, sentence_gather

if TYPE_CHECKING:
    from mg3d.models.encoded_batch import EncodedBatch
    from mg3d.models.network import MG3DNetwork

SentenceSet = tuple[Tensor, Tensor]


class GlobalBatchNorm(nn.Module):
    """Batch normalisation without affine over the valid rows of all processes; running statistics in evaluation.

    Untrained encoders map all volumes, and all sentences, to almost the same vector: cosines of such vectors hardly
    differ and the contrast stays at its start. Taking the common part away ends that. The statistics are those of the
    gathered batch, with their gradient, so N processes x batch b stay equal to one process x N b.

    Args:
        width: number of features E.
        momentum: weight of the newest batch in the running statistics.
        eps: added to the variance.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Standardise features [..., E] in float32; ``mask`` [...] tells which rows count (all when None)."""
        features = features.float()
        mean, variance = (self.mean, self.variance) if not self.training else self._statistics(features, mask)
        return (features - mean) * torch.rsqrt(variance + self.eps)

    def _statistics(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        rows_ME = features.flatten(0, -2)
        weight_M1 = rows_ME.new_ones(len(rows_ME), 1) if mask is None else mask.flatten()[:, None].to(rows_ME.dtype)
        count = _sum_over_processes(weight_M1).clamp(min=1)
        mean = _sum_over_processes(rows_ME * weight_M1) / count
        # Second pass about the mean: the squares of large common parts would cancel badly.
        variance = _sum_over_processes((rows_ME - mean).square() * weight_M1) / count
        with torch.no_grad():
            self.mean += self.momentum * (mean - self.mean)
            self.variance += self.momentum * (variance - self.variance)
        return mean, variance


def _sum_over_processes(rows_ME: Tensor) -> Tensor:
    """Sum [E] over the rows of all processes; the gradient reaches every process."""
    return gather_features(rows_ME.sum(0, keepdim=True)).sum(0)


class SharedSpaceHead(nn.Module):
    """Two projections of standardised features into one space; a report is the mean of its projected sentences.

    Args:
        image_width: E of the image tokens.
        text_width: E of the text encoder.
        embed_dim: P, width of the shared space.
        hidden_dim: width between the two layers of each projection; 0 takes twice ``embed_dim``.
        temperature: fixed divisor of the cosines, > 0.
    """

    def __init__(
        self, image_width: int, text_width: int, embed_dim: int = 256, hidden_dim: int = 0, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.temperature = temperature
        hidden = hidden_dim or 2 * embed_dim
        self.image_norm, self.text_norm = GlobalBatchNorm(image_width), GlobalBatchNorm(text_width)
        self.image_proj = _projection(image_width, hidden, embed_dim)
        self.text_proj = _projection(text_width, hidden, embed_dim)

    def embed_image(self, tokens_BNE: Tensor) -> Tensor:
        """Encoder tokens [B, N, E] -> unit vectors [B, P] in float32."""
        return unit_rows(self.image_proj(self.image_norm(tokens_BNE.mean(dim=1))).float())

    def embed_text(self, sentences_BSE: Tensor, mask_BS: Tensor) -> Tensor:
        """Sentence features [B, S, E] and mask [B, S] -> unit vectors [B, P] in float32 (zero without a sentence)."""
        projected_BSP = self.text_proj(self.text_norm(sentences_BSE, mask_BS))
        return unit_rows(masked_mean(projected_BSP, mask_BS).float())

    def logits(self, image_MP: Tensor, text_KP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [M, K] of unit vectors and their transpose, in float32."""
        with torch.autocast(image_MP.device.type, enabled=False):
            logits = image_MP.float() @ text_KP.float().t() / self.temperature
        return logits, logits.t()


def _projection(width: int, hidden: int, embed_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False))


def inner_tokens(mask: Tensor) -> Tensor:
    """Tokens between [CLS] and [SEP].

    Args:
        mask: [..., L], 1 on tokens (padding only at the end).

    Returns:
        bool [..., L]: the mask without its first and its last token.
    """
    inside = mask.bool() & mask.roll(-1, dims=-1).bool()
    inside[..., -1] = False
    inside[..., 0] = False
    return inside


def prompt_sentences(net: MG3DNetwork, ids_BL: Tensor, mask_BL: Tensor, index_BL: Tensor | None) -> SentenceSet:
    """Sentence features of whole texts: contextual tokens averaged over each sentence.

    Args:
        net: holds the text encoder.
        ids_BL: token ids with [CLS] and [SEP].
        mask_BL: 1 on tokens.
        index_BL: 1-based sentence of every token, below 1 = none; None takes each text as one sentence.

    Returns:
        [B, S, E] and the mask [B, S].
    """
    hidden_BLE = net.contextualize_text(net.embed_text(ids_BL), mask_BL)
    return sentence_gather(hidden_BLE, inner_tokens(mask_BL).long() if index_BL is None else index_BL)


def lone_sentences(net: MG3DNetwork, ids_BSn: Tensor, mask_BSn: Tensor) -> SentenceSet:
    """Features of sentences that are encoded one by one: [B, S, n] ids and token mask -> [B, S, E] and mask [B, S]."""
    ids, mask = ids_BSn.flatten(0, 1), mask_BSn.flatten(0, 1)
    hidden = net.contextualize_text(net.embed_text(ids), mask)
    inside = inner_tokens(mask)
    shape = ids_BSn.shape[:2]
    return masked_mean(hidden, inside).unflatten(0, shape), inside.any(dim=1).unflatten(0, shape)


class ImageTextContrast:
    """InfoNCE between the vector of a volume and the vector of its report.

    Args:
        options: uses ``itc_embed_dim``, ``itc_text_source``, ``cl_temp``, ``contrastive_gather``,
            ``same_report_pairs`` and the memory.
    """

    name = "itc"

    def __init__(self, options: NetworkOptions) -> None:
        self.options = options

    @staticmethod
    def components(options: NetworkOptions, image_width: int, text_width: int) -> dict[str, nn.Module]:
        """The projections ``image_text_itc_head`` and the optional memory."""
        head = SharedSpaceHead(image_width, text_width, options.itc_embed_dim, temperature=options.cl_temp)
        queue = build_queue("itc_loss_xbm", options.memory_queue, options.memory_queue_size, options.itc_embed_dim)
        return {"image_text_itc_head": head, **queue}

    def report_sentences(self, net: MG3DNetwork, encoded: EncodedBatch, batch: Mapping[str, Any]) -> SentenceSet:
        """Sentence features [B, S, E] of the batch's reports by ``itc_text_source``, and their mask [B, S]."""
        if self.options.itc_text_source == "sentence":
            sentences, mask = lone_sentences(net, batch["sen_txt_ids"], batch["sen_txt_masks"])
            return sentences, mask & encoded.has_text[:, None]
        return sentence_gather(encoded.text_hidden, encoded.sentence_index)

    def __call__(self, net: MG3DNetwork, encoded: EncodedBatch, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Term ``itc_loss`` and the share of volumes whose own report is the nearest of this process."""
        head, queue, valid = net.image_text_itc_head, getattr(net, "itc_loss_xbm", None), encoded.has_text
        image_BP = head.embed_image(encoded.image_tokens)
        text_BP = head.embed_text(*self.report_sentences(net, encoded, batch))
        keys = remembered_keys(queue, _same, _same, image_BP)
        same_MM, counted = same_report_pairs(encoded, self.options)
        loss = contrast(head, image_BP, text_BP, valid, self.options.contrastive_gather, keys, same_MM)
        if net.training:
            remember(queue, image_BP, text_BP, valid)
        return {"itc_loss": loss, **nearest_accuracy(image_BP, text_BP, valid), **counted}


def _same(vectors: Tensor) -> Tensor:
    return vectors


@torch.no_grad()
def nearest_accuracy(image_BP: Tensor, text_BP: Tensor, valid_B: Tensor) -> dict[str, Tensor]:
    """How often the nearest valid text of an image is its own: ``accuracy`` and ``accuracy_count``.

    Args:
        image_BP: unit vectors [B, P].
        text_BP: unit vectors [B, P].
        valid_B: pairs that count [B], bool.
    """
    cosine = (image_BP @ text_BP.t()).masked_fill(~valid_B[None, :], -2.0)
    hit = (cosine.argmax(dim=1) == torch.arange(len(cosine), device=cosine.device)) & valid_B
    count = valid_B.sum()
    return {"accuracy": hit.sum() / count.clamp(min=1), "accuracy_count": count}
