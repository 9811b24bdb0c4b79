"""The features of one batch, computed on first use and then shared by every objective.

Shape legend: B batch, D/H/W volume axes, N image tokens, L text tokens, S sentences, C hidden, E encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mg3d.models.masking import cells_to_voxels
from mg3d.models.pooling import masked_mean, sentence_gather

if TYPE_CHECKING:
    from mg3d.models.network import MG3DNetwork


class EncodedBatch:
    """Lazy views of a batch: the volume is encoded at most once plain and once masked, each text at most once.

    Args:
        net: the network that encodes.
        batch: output of the collate function; only the entries an objective asks for are read.
    """

    def __init__(self, net: MG3DNetwork, batch: Mapping[str, Any]) -> None:
        self._net = net
        self._batch = batch

    # ---------------------------------------------------------------- image
    @cached_property
    def volume(self) -> Tensor:
        """Volume [B, 1, D, H, W] in [0, 1]."""
        return self._batch["image"].transpose(1, 2)

    @cached_property
    def voxel_mask(self) -> Tensor:
        """Masked voxels [B, 1, D, H, W], bool, True where the volume is zeroed."""
        size = tuple(self.volume.shape[2:])
        return cells_to_voxels(self._batch["mim_mask"] != 0, size, self._net.options.mim_window)[:, None]

    @cached_property
    def masked_volume(self) -> Tensor:
        """Volume [B, 1, D, H, W] with the masked cells set to zero."""
        return self.volume.masked_fill(self.voxel_mask, 0.0)

    @cached_property
    def image_tokens(self) -> Tensor:
        """Encoder tokens of the plain volume [B, N, E]."""
        return self._net.vision_encoder.tokens(self.volume)

    @cached_property
    def masked_image_tokens(self) -> Tensor:
        """Encoder tokens of the masked volume [B, N, E]."""
        return self._net.vision_encoder.tokens(self.masked_volume)

    @cached_property
    def image(self) -> Tensor:
        """Projected tokens of the plain volume [B, N, C]."""
        return self._net.project_image(self.image_tokens)

    @cached_property
    def masked_image(self) -> Tensor:
        """Projected tokens of the masked volume [B, N, C]."""
        return self._net.project_image(self.masked_image_tokens)

    @cached_property
    def contrast_image(self) -> Tensor:
        """Image tokens [B, N, C] of the local contrast; the published flow projects them a second time (spec 8.C)."""
        return self._reproject(self.image)

    @cached_property
    def false_image(self) -> Tensor:
        """Image tokens [B * K, N, C] of the K negative volumes of each study, as :attr:`contrast_image`."""
        if "false_image" not in self._batch:
            raise ValueError("the batch has no false_image: image-text matching needs draw_false_image of at least 1")
        volume = self._batch["false_image"].flatten(0, 1).transpose(1, 2)
        return self._reproject(self._net.project_image(self._net.vision_encoder.tokens(volume)))

    def _reproject(self, image_BNC: Tensor) -> Tensor:
        if self._net.options.image_feature_reuse == "projected_reference":
            return self._net.project_image(image_BNC)
        return image_BNC

    # ---------------------------------------------------------------- text
    @cached_property
    def has_text(self) -> Tensor:
        """Reports that hold at least one sentence [B], bool."""
        known = self._batch.get("has_text")
        if known is not None:
            return known.bool()
        return (self._batch["sentence_index"] > 0).any(dim=1)

    @cached_property
    def report_key(self) -> Tensor:
        """Equal numbers for equal reports [B], int64."""
        return self._batch["report_key"]

    @cached_property
    def text_embeddings(self) -> Tensor:
        """Embedding-layer output of the complete report [B, L, E]."""
        return self._net.embed_text(self._batch["text_ids"])

    @cached_property
    def text_hidden(self) -> Tensor:
        """Contextual text features of the complete report [B, L, E]."""
        return self._net.contextualize_text(self.text_embeddings, self._batch["text_masks"])

    @cached_property
    def text(self) -> Tensor:
        """Projected contextual tokens of the complete report [B, L, C]."""
        return self._net.project_text(self.text_hidden)

    @cached_property
    def masked_text(self) -> Tensor:
        """Projected contextual tokens of the word-masked report [B, L, C]."""
        embedded = self._net.embed_text(self._batch["text_ids_mlm"])
        return self._net.project_text(self._net.contextualize_text(embedded, self._batch["text_masks"]))

    @cached_property
    def sentence_index(self) -> Tensor:
        """Sentence number of every token [B, L]; -1 outside sentences and in reports without text."""
        return self._batch["sentence_index"].masked_fill(~self.has_text[:, None], -1)

    @cached_property
    def embedded_sentences(self) -> tuple[Tensor, Tensor]:
        """Mean embedding-layer output per sentence [B, S, E] and which rows exist [B, S]."""
        return sentence_gather(self.text_embeddings, self.sentence_index)

    @cached_property
    def sentences(self) -> tuple[Tensor, Tensor]:
        """Mean projected token per sentence [B, S, C] and which rows exist [B, S]."""
        text = self.text.detach() if self._net.options.itc_detach_sentences else self.text
        return sentence_gather(text, self.sentence_index)

    @cached_property
    def sentence_targets(self) -> Tensor:
        """Text side of the similarity matching [B, S, E]: mean embedding of each sentence encoded alone (spec 8.C.7).

        The mean runs over all its tokens, [CLS] and [SEP] included.

        Raises:
            ValueError: if the batch holds another number of stand-alone sentences than the reports have.
        """
        ids_BSn, tokens_BSn = self._batch["sen_txt_ids"], self._batch["sen_txt_masks"]
        found = self.sentences[0].shape[1]
        if ids_BSn.shape[1] != found:
            raise ValueError(f"sen_txt_ids has {ids_BSn.shape[1]} sentence slots, sentence_index has {found}")
        with torch.no_grad():
            embedded = self._net.embed_text(ids_BSn.flatten(0, 1))
            return masked_mean(embedded, tokens_BSn.flatten(0, 1) != 0).unflatten(0, ids_BSn.shape[:2])
