"""Key maps: which program wrote a weights file, what its names mean here, and what of it cannot be used.

| family | how it is told | what is used |
|---|---|---|
| ``mg3d`` | ``vision_encoder.`` with 3-D convolutions | everything |
| ``swin_unetr`` | ``swinViT.`` (MONAI's SwinUNETR, v2 and VoCo too) | the Swin entries, 11 of the five encoder blocks |
| ``swin_simmim`` | ``encoder.layers1.0.0.`` (MONAI's ``ssl_pretrained_weights``) | the Swin entries |
| ``swin`` | ``layers1.0.blocks.`` (bare encoder, MONAI's ``model_swinvit``) | the Swin entries |
| ``nnunet`` | ``encoder.stages.`` | the encoder, once (nnU-Net stores it twice) |
| ``unet`` | ``down_tr64.`` (Models Genesis, PCRLv2) | the contracting path |
| ``meter`` | ``text_transformer.`` / ``cross_modal_`` | text encoder, fusion layers, text heads of equal shape |
| ``ct_clip`` | ``text_transformer.`` with ``to_text_latent.`` or ``visual_transformer.`` | text encoder, its latents |
| ``ptunifier`` | 2-D convolutions under ``vision_encoder.`` | text encoder, fusion layers, text heads of equal shape |

Patch merging leaves no trace in names or shapes: files made with MONAI before 1.5 ("legacy") and from 1.5 on ("fixed")
cannot be told apart. A file that does not say is taken as legacy, like all published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

TWO_DIMENSIONAL = "part of a 2-D image encoder, which a 3-D one cannot take over"
OF_TWO_DIMENSIONAL = "made for the features of a 2-D image encoder"
OTHER_TASK = "head of another task"
CONSTANT = "constant of an old library version"
STORED_TWICE = "second copy of another entry"
NEVER_CALLED = "classifier that is never called"
OLD_QUEUE = "memory queue of an intermediate revision"
OTHER_ENCODER = "CT-CLIP's own image encoder (CTViT), which is none of this project's"
OF_OTHER_ENCODER = "made for the tokens of CT-CLIP's own image encoder"
NEVER_USED = "second projection, which CT-CLIP does not use"
MASK_TOKEN = "token or norm used only while pre-training elsewhere"

CONSTANT_SUFFIXES = (".relative_position_index", "embeddings.position_ids", "embeddings.token_type_ids")
"""Constant buffers of old library versions; they follow from the architecture."""

TEXT_FAMILIES = ("ct_clip",)
_TEXT_AND_FUSION = "a 2-D file gives text and fusion parts"
WITHOUT_ENCODER: Mapping[str, str] = {
    "meter": _TEXT_AND_FUSION,
    "ptunifier": _TEXT_AND_FUSION,
    "ct_clip": "a CT-CLIP file gives its text encoder",
}
"""Families whose image encoder cannot be taken over -> what can."""

SWIN_FAMILIES = ("swin_unetr", "swin_simmim", "swin")

SUPPORTED = "MG-3D, MONAI's SwinUNETR and VoCo, nnU-Net v2, Models Genesis, PCRLv2, METER, PTUnifier, CT-CLIP"

RESIDUAL_BLOCK = re.compile(r"(^|\.)layers\d+c\.")
"""Entries of the residual convolution blocks of SwinUNETR v2 (MONAI's ``use_v2=True``)."""

_ENCODER_ENTRIES: Mapping[str, str] = {
    "mg3d": r"vision_encoder\.(?!encoder\d+\.)",
    "swin_unetr": r"swinViT\.",
    "swin_simmim": r"(swinViT|encoder)\.",
    "swin": r"(patch_embed|layers\d|proj_head|pos_|absolute_pos)",
    "nnunet": r"encoder\.",
    "unet": r"down_tr\d",
}
"""Family -> which translated names belong to its image encoder; segmentation blocks, decoders and heads do not."""

_OWN_PARTS = ("language_encoder.", "multi_modal_", "local_", "clm_head.", "mlm_head.", "image_text_itc_head.")

_Rules = tuple[tuple[str, str], ...]

_COMMON: _Rules = (
    (r"^(vision_encoder\.)?swin_vit\.", r"\1swinViT."),
    (r"\.mlp\.fc1\.", ".mlp.linear1."),
    (r"\.mlp\.fc2\.", ".mlp.linear2."),
)

_RENAMES: Mapping[str, _Rules] = {
    "swin_simmim": (
        (r"^encoder\.(layers\d+)\.0\.0\.", r"swinViT.\1.0."),
        (r"^encoder\.patch_embed\.", "swinViT.patch_embed."),
    ),
    "ct_clip": ((r"^text_transformer\.", "language_encoder."),),
    "meter": (
        (r"^text_transformer\.", "language_encoder."),
        (r"^cross_modal_text_transform\.", "multi_modal_language_proj."),
        (r"^cross_modal_image_layers\.", "multi_modal_vision_layers."),
        (r"^cross_modal_text_layers\.", "multi_modal_language_layers."),
        (r"^cross_modal_text_pooler\.", "multi_modal_language_pooler."),
        (r"^token_type_embeddings\.", "modality_type_embeddings."),
        (r"^mlm_score\.", "mlm_head."),
        (r"^itm_score\.", "itm_head."),
    ),
}

_CT_CLIP = re.compile(r"visual_transformer\.|to_(text|visual)_latent\.")
_TASK_HEADS = r"^(vqa|cls|mlc|irtr|nlvr2|snli|rank|mpp|mim|clm)_(head|classifier|output|score)\."

_DROPS: Mapping[str, _Rules] = {
    "mg3d": (
        (r"^vision_encoder\.head\.", NEVER_CALLED),
        (r"^(cml|dcl|ssm)_loss_\w+_xbm\.", OLD_QUEUE),
    ),
    "unet": ((r"^head\.", NEVER_CALLED),),
    "swin_unetr": ((r"^swin(ViT|_vit)\.mask_token", MASK_TOKEN),),
    "swin_simmim": ((r"^encoder\.(mask_token|norm\.)", MASK_TOKEN),),
    "nnunet": (
        (r"^decoder\.encoder\.", STORED_TWICE),
        (r"\.all_modules\.", STORED_TWICE),
    ),
    "ct_clip": (
        (r"^visual_transformer\.", OTHER_ENCODER),
        (r"^to_visual_latent\.", OF_OTHER_ENCODER),
        (r"^to_(text|visual)_latent_extra\.", NEVER_USED),
    ),
    "meter": (
        (r"^(vit_model|vision_encoder)\.", TWO_DIMENSIONAL),
        (r"^cross_modal_image_(transform|pooler)\.", OF_TWO_DIMENSIONAL),
        (r"^(avgpool|pos_embed)", TWO_DIMENSIONAL),
        (_TASK_HEADS, OTHER_TASK),
    ),
    "ptunifier": (
        (r"^vision_encoder\.", TWO_DIMENSIONAL),
        (r"^multi_modal_vision_(proj|pooler)\.", OF_TWO_DIMENSIONAL),
        (_TASK_HEADS, OTHER_TASK),
    ),
}


@dataclass(frozen=True)
class Translation:
    """A foreign state dict in this project's names.

    Attributes:
        family: which program's layout it is; ``unknown`` if none is recognised.
        names: name in the file -> name here, for every entry that may be of use.
        dropped: name in the file -> why it is of no use.
    """

    family: str
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """Say which program's layout a state dict has.

    Args:
        tensors: name -> tensor, outer prefixes such as ``module.`` removed.

    Returns:
        A family of the table above, or ``unknown``.
    """
    own = {name: value for name, value in tensors.items() if name.startswith("vision_encoder.")}
    if any(name.startswith("text_transformer.") for name in tensors) and any(map(_CT_CLIP.match, tensors)):
        return "ct_clip"
    if any(name.startswith(("text_transformer.", "cross_modal_")) for name in tensors):
        return "meter"
    if any(value.dim() == 4 for value in own.values()):
        return "ptunifier"
    if own:
        return "mg3d"
    marks = (
        ("swin_unetr", r"swin(ViT|_vit)\."),
        ("swin_simmim", r"encoder\.layers1\.0\.0\."),
        ("swin", r"layers1\.0\.blocks\."),
        ("nnunet", r"encoder\.(stem|stages)\."),
        ("unet", r"down_tr64\."),
    )
    return next((family for family, mark in marks if any(re.match(mark, name) for name in tensors)), "unknown")


def is_encoder_entry(name: str, family: str) -> bool:
    """Whether a translated name belongs to the image encoder of its file, so that leaving it out changes features."""
    pattern = _ENCODER_ENTRIES.get(family)
    return pattern is not None and re.match(pattern, name) is not None


def is_foreign(tensors: Mapping[str, Tensor]) -> bool:
    """Whether nothing in a state dict is known here: no family, no part of this project's networks."""
    return recognise(tensors) == "unknown" and not any(name.startswith(_OWN_PARTS) for name in tensors)


def translate(tensors: Mapping[str, Tensor]) -> Translation:
    """Put every entry of a state dict under this project's name, or say why it is of no use.

    Args:
        tensors: name -> tensor, outer prefixes removed.
    """
    family = recognise(tensors)
    result = Translation(family)
    renames = (*_RENAMES.get(family, ()), *_COMMON)
    for name in tensors:
        reason = next((why for pattern, why in _DROPS.get(family, ()) if re.search(pattern, name)), None)
        if reason:
            result.dropped[name] = reason
            continue
        found = name
        for pattern, replacement in renames:
            found = re.sub(pattern, replacement, found)
        result.names[name] = found
    return result
