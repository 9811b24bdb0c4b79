"""The local contrast of MG-3D (spec 8.C and 9): CML + DCL + SSM.

Shape legend: B batch, N image tokens, S sentences, C hidden, E encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mg3d.models.fusion import UnidirectionalCrossAttention
from mg3d.models.heads import ITCHead, ITCHeadSingle
from mg3d.models.losses import sentence_similarity_loss
from mg3d.models.objectives.contrast import build_queue, contrast, remember, remembered_keys, same_report_pairs
from mg3d.models.options import NetworkOptions
from mg3d.models.pooling import SentencePooler, SwinAttPooler

if TYPE_CHECKING:
    from mg3d.models.encoded_batch import EncodedBatch
    from mg3d.models.network import MG3DNetwork


@dataclass(frozen=True)
class LocalFeatures:
    """Features that the three terms compare.

    Attributes:
        uni_modal: text and image before fusion, side by side [B, 2C].
        multi_modal: text and image after fusion, side by side [B, 2C].
        fused_image: image after fusion [B, C].
        aggregated_image: image gathered through the report's sentences [B, C].
        visual_sentences: what the image says to each sentence [B, S, 128].
        mask: which sentences exist [B, S].
    """

    uni_modal: Tensor
    multi_modal: Tensor
    fused_image: Tensor
    aggregated_image: Tensor
    visual_sentences: Tensor
    mask: Tensor


class LocalContrast:
    """Contrast of fused against single modalities, of global against aggregated image, and of sentence similarities.

    Args:
        options: uses ``cl_temp`` (through the heads), ``contrastive_gather``, ``same_report_pairs``, the two
            ``ssm_*_threshold``.
    """

    name = "local_itc"

    def __init__(self, options: NetworkOptions) -> None:
        self.options = options

    @staticmethod
    def components(options: NetworkOptions, image_width: int, text_width: int) -> dict[str, nn.Module]:
        """Aggregation layers, sentence pooler, the two contrastive heads and the optional memories."""
        hidden, layers = options.hidden_size, range(options.num_top_layer)
        modules: dict[str, nn.Module] = {
            "agg_img_cross_attention": nn.ModuleList(UnidirectionalCrossAttention(hidden) for _ in layers),
            # In every published checkpoint, but its result is never used.
            "agg_text_cross_attention": nn.ModuleList(UnidirectionalCrossAttention(hidden) for _ in layers),
            "multi_modal_agg_vision_pooler": SwinAttPooler(hidden),
            "multi_modal_sen_vision_pooler": SentencePooler(hidden, 384, 128),
            "itc_cross_head": ITCHead(2 * hidden, hidden, options.cl_temp),
            "itc_agg_head": ITCHeadSingle(hidden, options.cl_temp),
        }
        for name, width in (("cml_loss_cls_xbm", 2 * hidden), ("dcl_loss_cls_xbm", hidden)):
            modules |= build_queue(name, options.memory_queue, options.memory_queue_size, width)
        return modules

    def features(self, net: MG3DNetwork, encoded: EncodedBatch) -> LocalFeatures:
        """Features before the heads."""
        sentences_BSC, mask_BS = encoded.sentences
        image_BNC = encoded.contrast_image
        text_cls = net.uni_global_text_attention(sentences_BSC, mask_BS)
        image_cls = net.uni_modal_vision_pooler(image_BNC)
        fused_text, fused_image = net.fused_cls(image_BNC, sentences_BSC, mask_BS)
        gated_BSC, aggregated = self._aggregate(net, sentences_BSC, mask_BS, image_cls)
        return LocalFeatures(
            uni_modal=torch.cat([text_cls, image_cls], dim=1),
            multi_modal=torch.cat([fused_text, fused_image], dim=1),
            fused_image=fused_image,
            aggregated_image=aggregated,
            visual_sentences=net.multi_modal_sen_vision_pooler(gated_BSC, mask_BS),
            mask=mask_BS,
        )

    def _aggregate(
        self, net: MG3DNetwork, gated_BSC: Tensor, mask_BS: Tensor, image_BC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gate every sentence by the image and pool them to a new image vector, once a layer (spec 8.C.6)."""
        layer: Any  # an UnidirectionalCrossAttention; the list only knows nn.Module
        for layer in net.agg_img_cross_attention:
            gated_BSC, _ = layer.gate_each(gated_BSC, image_BC.unsqueeze(1), mask_BS)
            image_BC = net.multi_modal_agg_vision_pooler(gated_BSC, mask_BS)
        return gated_BSC, image_BC

    def __call__(self, net: MG3DNetwork, encoded: EncodedBatch, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Terms ``local_itc_loss`` = ``cml`` + ``dcl`` + ``ssm``."""
        options, found = self.options, self.features(net, encoded)
        valid = encoded.has_text
        same_MM, counted = same_report_pairs(encoded, options)
        cml = self._pair_term(
            net, "cml_loss_cls_xbm", net.itc_cross_head, found.multi_modal, found.uni_modal, valid, same_MM
        )
        dcl = self._pair_term(
            net, "dcl_loss_cls_xbm", net.itc_agg_head, found.fused_image, found.aggregated_image, valid, same_MM
        )
        ssm = sentence_similarity_loss(
            found.visual_sentences,
            encoded.sentence_targets,
            found.mask,
            options.ssm_positive_threshold,
            options.ssm_negative_threshold,
            options.contrastive_gather,
        )
        return {"local_itc_loss": cml + dcl + ssm, "cml": cml, "dcl": dcl, "ssm": ssm, **counted}

    def _pair_term(
        self,
        net: MG3DNetwork,
        queue_name: str,
        head: ITCHead,
        left_BF: Tensor,
        right_BF: Tensor,
        valid_B: Tensor,
        same_MM: Tensor | None,
    ) -> Tensor:
        queue: Any = getattr(net, queue_name, None)
        left_BP, right_BP = head.embed_image(left_BF), head.embed_text(right_BF)
        keys = remembered_keys(queue, head.embed_image, head.embed_text, left_BP)
        loss = contrast(head, left_BP, right_BP, valid_B, self.options.contrastive_gather, keys, same_MM)
        if net.training:
            remember(queue, left_BF, right_BF, valid_B)
        return loss
