"""Image-text matching, a classic objective (off in the published config): does this volume belong to this report.

Shape legend: B batch, K negative volumes a study, N image tokens, S sentences, C hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.distributed import global_mean
from mg3d.models.heads import ITMHead
from mg3d.models.options import NetworkOptions

if TYPE_CHECKING:
    from mg3d.models.encoded_batch import EncodedBatch
    from mg3d.models.network import MG3DNetwork

NO_MATCH, MATCH = 0, 1


class ImageTextMatching:
    """Binary decision on the fused global vectors, with drawn volumes of other studies as negatives.

    Matching and non-matching pairs weigh the same, whatever K is. Reports without text take no part.

    Args:
        options: uses ``contrastive_gather`` (how counts are shared between processes).
    """

    name = "itm"

    def __init__(self, options: NetworkOptions) -> None:
        self.options = options

    @staticmethod
    def components(options: NetworkOptions, image_width: int, text_width: int) -> dict[str, nn.Module]:
        """The head ``itm_head``."""
        return {"itm_head": ITMHead(2 * options.hidden_size)}

    def __call__(self, net: MG3DNetwork, encoded: EncodedBatch, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Term ``itm_loss`` and the share of right decisions."""
        valid_B, draws = encoded.has_text, encoded.false_image.shape[0] // encoded.has_text.shape[0]
        image, sentences, mask = self._pairs(encoded, draws)
        logits = net.itm_head(torch.cat(net.fused_cls(image, sentences, mask), dim=1))
        studies = valid_B.shape[0]
        label = torch.full((len(logits),), NO_MATCH, device=logits.device)
        label[:studies] = MATCH
        valid = torch.cat([valid_B, valid_B.repeat_interleave(draws)])
        weight = torch.full_like(valid, 1, dtype=torch.float32)
        weight[studies:] = 1.0 / draws
        each = functional.cross_entropy(logits.float(), label, reduction="none") * weight
        loss = global_mean(each.masked_fill(~valid, 0.0).sum(), 2 * valid_B.sum(), self.options.contrastive_gather)
        count = valid.sum()
        correct = ((logits.argmax(dim=1) == label) & valid).sum()
        return {"itm_loss": loss, "accuracy": correct / count.clamp(min=1), "accuracy_count": count}

    @staticmethod
    def _pairs(encoded: EncodedBatch, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens, sentences and masks of the B true pairs followed by the B * K false ones."""
        sentences_BSC, mask_BS = encoded.sentences
        image = torch.cat([encoded.contrast_image, encoded.false_image])
        sentences = torch.cat([sentences_BSC, sentences_BSC.repeat_interleave(draws, dim=0)])
        return image, sentences, torch.cat([mask_BS, mask_BS.repeat_interleave(draws, dim=0)])
