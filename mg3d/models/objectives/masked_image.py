"""Masked-image modelling (spec 8.B and 9): rebuild the zeroed cells of the volume.

Shape legend: B batch, D/H/W volume axes, d/h/w token grid, N image tokens, C hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mg3d.models.heads import MIMHead
from mg3d.models.losses import mim_loss
from mg3d.models.options import NetworkOptions

if TYPE_CHECKING:
    from mg3d.models.encoded_batch import EncodedBatch
    from mg3d.models.network import MG3DNetwork


class MaskedImage:
    """Encode the masked volume, fuse it with the report, decode it back to voxels.

    Reports without text take part: the objective is about the image. With ``mim_fusion="mlm_cross"`` (published) the
    padded report gates the image as any other; with ``"mim_cross"``, which looks at sentences only, and with
    ``image_only`` an image without text is decoded as it is.

    Args:
        options: uses ``mim_fusion``, ``image_only`` and ``contrastive_gather``.
    """

    name = "swin_unetr_mim"

    def __init__(self, options: NetworkOptions) -> None:
        self.options = options

    @staticmethod
    def components(options: NetworkOptions, image_width: int, text_width: int) -> dict[str, nn.Module]:
        """The decoder ``mim_swin_unter_head``."""
        return {"mim_swin_unter_head": MIMHead(options.hidden_size)}

    def reconstruct(self, net: MG3DNetwork, encoded: EncodedBatch) -> Tensor:
        """Volume rebuilt from its masked version [B, 1, D, H, W]."""
        image_BNC = self._fuse(net, encoded)
        return net.mim_swin_unter_head(image_BNC.transpose(1, 2).unflatten(2, net.token_grid))

    def _fuse(self, net: MG3DNetwork, encoded: EncodedBatch) -> Tensor:
        if self.options.image_only:
            return encoded.masked_image
        if self.options.mim_fusion == "mlm_cross":
            return net.fuse_report(encoded.text, encoded.masked_image)[1]
        fused, _ = net.fuse_sentences(encoded.masked_image, *encoded.sentences)
        return torch.where(encoded.has_text[:, None, None], fused, encoded.masked_image)

    def __call__(self, net: MG3DNetwork, encoded: EncodedBatch, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Term ``swin_unetr_mim_loss``: mean squared error over the masked voxels."""
        recon = self.reconstruct(net, encoded)
        loss = mim_loss(recon, encoded.volume, encoded.voxel_mask, gather=self.options.contrastive_gather)
        return {"swin_unetr_mim_loss": loss}
