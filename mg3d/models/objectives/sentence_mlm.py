"""Masked language modelling with sentence alignment (spec 8.A and 9: MLM + SAL).

Shape legend: B batch, L text tokens, S sentences, C hidden, E encoder width, M labelled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mg3d.models.distributed import all_reduce_sum
from mg3d.models.heads import SentenceMLMHead
from mg3d.models.losses import IGNORE_LABEL, mlm_loss, sentence_alignment_loss
from mg3d.models.options import NetworkOptions

if TYPE_CHECKING:
    from mg3d.models.encoded_batch import EncodedBatch
    from mg3d.models.network import MG3DNetwork


class SentenceMLM:
    """Predict masked words from the report fused with the volume, and keep each sentence's meaning.

    Args:
        options: uses ``sal_weight``, ``sal_detach_target`` and ``contrastive_gather``.
    """

    name = "sen_mlm"

    def __init__(self, options: NetworkOptions) -> None:
        self.options = options

    @staticmethod
    def components(options: NetworkOptions, image_width: int, text_width: int) -> dict[str, nn.Module]:
        """``mlm_head`` and the small target network ``uni_emd_sen``."""
        middle = options.hidden_size // 2
        return {
            "mlm_head": SentenceMLMHead(options.hidden_size, options.vocab_size),
            "uni_emd_sen": nn.Sequential(nn.Linear(text_width, middle), nn.ReLU(), nn.Linear(middle, 8)),
        }

    def __call__(self, net: MG3DNetwork, encoded: EncodedBatch, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Terms ``sen_mlm_loss`` = ``mlm`` + ``sal``, and the accuracy over the labelled words of all processes."""
        options = self.options
        text_BLC, _ = net.fuse_report(encoded.masked_text, encoded.image)
        transformed = net.mlm_head.transform(text_BLC)
        labels_BL = batch["text_labels_mlm"].masked_fill(~encoded.has_text[:, None], IGNORE_LABEL)
        chosen = labels_BL != IGNORE_LABEL
        # The vocabulary is by far the widest layer: only labelled positions go through it.
        logits_MV, labels_M = net.mlm_head.vocabulary_logits(transformed[chosen]), labels_BL[chosen]
        mlm = mlm_loss(logits_MV, labels_M, options.contrastive_gather)
        recon_BS8, mask_BS = net.mlm_head.sentence_features(transformed, encoded.sentence_index)
        sal = sentence_alignment_loss(
            recon_BS8,
            net.uni_emd_sen(encoded.embedded_sentences[0]),
            mask_BS,
            encoded.has_text,
            options.sal_weight,
            options.sal_detach_target,
            options.contrastive_gather,
        )
        hits = torch.stack([(logits_MV.argmax(dim=-1) == labels_M).sum(), chosen.sum()])
        correct, count = all_reduce_sum(hits)  # processes hold different numbers of words: no mean of means
        terms = {"sen_mlm_loss": mlm + sal, "mlm": mlm, "sal": sal}
        return terms | {"accuracy": correct / count.clamp(min=1), "accuracy_count": hits[1]}
