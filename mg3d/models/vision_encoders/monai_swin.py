"""MONAI's own Swin networks with the merging order that the weights were trained with.

MONAI from 1.5 on merges in the "fixed" order; pass :class:`LegacyPatchMerging` as its ``downsample`` to run weights
trained with the legacy order, for example in ``monai.networks.nets.SwinUNETR``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.networks.nets.swin_unetr import SwinUNETR
from torch import nn

from mg3d.models.vision_encoders.swin import PatchMerging


class LegacyPatchMerging(PatchMerging):
    """Legacy patch merging with the signature that MONAI calls; parameter names are the same.

    Args:
        dim: channels C of the input.
        norm_layer: accepted for MONAI's sake; only ``LayerNorm`` is possible.
        spatial_dims: accepted for MONAI's sake; only 3 is possible.

    Raises:
        ValueError: another norm or number of axes.
    """

    patch_merging = "legacy"

    def __init__(self, dim: int, norm_layer: type[nn.Module] = nn.LayerNorm, spatial_dims: int = 3) -> None:
        if norm_layer is not nn.LayerNorm or spatial_dims != 3:
            raise ValueError(f"legacy merging is 3-D with LayerNorm, got {spatial_dims} axes and {norm_layer}")
        super().__init__(dim, "legacy")


def swin_unetr_options(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of MONAI's SwinUNETR that fit an encoder, in plain types (``downsample`` is left to the caller).

    Args:
        encoder: ``metadata()`` of a Swin encoder.

    Raises:
        ValueError: no Swin encoder, or a patch that is no cube.
    """
    if "embed_dim" not in encoder or len(set(encoder["patch_size"])) != 1 or len(encoder["depths"]) != 4:
        raise ValueError(f"SwinUNETR takes a Swin encoder of four stages with cubic patches, got {dict(encoder)}")
    return {
        "in_channels": 1,
        "feature_size": encoder["embed_dim"],
        "depths": list(encoder["depths"]),
        "num_heads": list(encoder["num_heads"]),
        "window_size": list(encoder["window_size"]),
        "patch_size": encoder["patch_size"][0],
        "mlp_ratio": encoder["mlp_ratio"],
        **({"use_v2": True} if encoder.get("residual_blocks") else {}),
    }


def build_swin_unetr(encoder: Mapping[str, Any], out_channels: int, **options: Any) -> SwinUNETR:
    """MONAI's SwinUNETR around an encoder of this project, with the encoder's merging order.

    Args:
        encoder: ``metadata()`` of a Swin encoder.
        out_channels: classes of the segmentation.
        **options: further arguments of SwinUNETR.

    Returns:
        The network, randomly initialised; load weights with :func:`mg3d.models.checkpoint.load_weights`.

    Raises:
        ValueError: no Swin encoder.
    """
    merging: Any = "merging" if encoder.get("patch_merging") == "fixed" else LegacyPatchMerging
    return SwinUNETR(out_channels=out_channels, downsample=merging, **(swin_unetr_options(encoder) | options))
