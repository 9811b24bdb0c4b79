"""Weights of any accepted file in this project's names with a full description, and on to MONAI's SwinUNETR.

nnU-Net is :mod:`mg3d.models.nnunet_format`. Merging layers cannot be converted between the two orders: legacy
weights read two sub-grids twice and two never, so they need legacy merging wherever they run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.errors import CheckpointError
from mg3d.models.bounds import check_metadata
from mg3d.models.checkpoint import (
    CoverageReport,
    check_coverage,
    check_dtypes,
    check_known,
    match_tensors,
    says_merging,
    stored_merging,
)
from mg3d.models.nnunet_format import describe_encoder, stated_architecture
from mg3d.models.vision_encoders import encoder_from_metadata
from mg3d.models.weight_maps import CONSTANT_SUFFIXES, NEVER_CALLED, Translation, is_encoder_entry, translate
from mg3d.models.weight_shapes import ENCODER_PREFIX, infer_encoder, infer_network
from mg3d.models.weights_file import FORMAT_VERSION, NNUNET_KEY, WeightsFile, read_weights_file

KEPT_HYPERPARAMETERS = ("max_text_len", "hidden_size", "num_top_layer", "fusion_variant", "itc_embed_dim")

_ENCODER_ENTRY = re.compile(r"(patch_embed|layers\d+c?|proj_head|down_tr\d+|encoder\.stem|encoder\.stages)\.")
_SEGMENTATION_BLOCK = re.compile(r"encoder\d+\.")


@dataclass(frozen=True)
class OwnWeights:
    """Weights in this project's names.

    Attributes:
        tensors: name -> tensor; the image encoder under ``vision_encoder.``.
        metadata: description of the model, complete as far as the file and its shapes tell.
        report: what became of every entry of the file, with the encoder's entries as the target.
        merging_assumed: the file holds merging layers and does not say their order.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    report: CoverageReport
    merging_assumed: bool = False


def read_own_weights(
    path: str | os.PathLike[str],
    *,
    patch_merging: str | None = None,
    allow_partial: bool = False,
    cast: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> OwnWeights:
    """Read any accepted file into this project's names.

    Args:
        path: the file, or an export folder.
        patch_merging: order of a Swin encoder whose file does not say (``legacy`` when None).
        allow_partial: accept a file that covers less than 95 % of the encoder that its shapes describe.
        cast: turn floating-point tensors of another precision into float32.
        extra: facts that the file lacks, for example the geometry of the volumes; the file's own win.

    Raises:
        CheckpointError: unreadable or incomplete file, other dtype, or a contradicted merging order.
    """
    file = read_weights_file(path)
    check_known(file.tensors, path)
    translation = translate(file.tensors)
    own = {name: own_name(here, translation.family) for name, here in translation.names.items()}
    tensors = {key: file.tensors[name] for name, key in own.items() if key}
    if cast:
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    metadata = _describe(file, translation, tensors, stored_merging(file, patch_merging, path), extra or {})
    check_metadata(metadata, path)
    target = {ENCODER_PREFIX + name: value for name, value in meta_encoder(metadata).state_dict().items()}
    wanted = {key: torch.float32 if value.is_floating_point() else value.dtype for key, value in tensors.items()}
    wanted |= {key: value.dtype for key, value in target.items() if key in tensors}
    check_dtypes(tensors, wanted, path)
    report = _coverage(file.tensors, tensors, target)
    report.patch_merging = metadata.get("patch_merging", "")
    check_coverage(report, path, 0.0 if allow_partial else 0.95)
    kept = {key: value for key, value in tensors.items() if key not in {name for name, _, _ in report.reshaped}}
    return OwnWeights(kept, metadata, report, report.has_merging and not says_merging(file.metadata))


def own_name(name: str, family: str) -> str | None:
    """Name of an entry in this project's networks; None for what has no place there.

    Args:
        name: translated name, see :func:`mg3d.models.weight_maps.translate`.
        family: layout of the file.
    """
    if name.endswith(CONSTANT_SUFFIXES):
        return None
    if name.startswith("swinViT."):
        return ENCODER_PREFIX + name.removeprefix("swinViT.")
    if family == "swin_unetr":
        return ENCODER_PREFIX + name if _SEGMENTATION_BLOCK.match(name) else None
    if family in ("swin", "unet", "nnunet"):
        return ENCODER_PREFIX + name if _ENCODER_ENTRY.match(name) else None
    return None if family == "swin_simmim" else name


def meta_encoder(metadata: Mapping[str, Any]) -> nn.Module:
    """The described image encoder without memory behind its parameters; an empty module where none is described."""
    if not metadata["vision_encoder"]:
        return nn.Module()
    with torch.device("meta"):
        return encoder_from_metadata(metadata["vision_encoder"])


def _describe(
    file: WeightsFile, translation: Translation, tensors: Mapping[str, Tensor], order: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The stored description, completed from the shapes; only known keys of a foreign file's hyper-parameters."""
    pcrlv2 = NEVER_CALLED in translation.dropped.values()
    stored, inferred = file.metadata, infer_network(tensors)
    inferred["vision_encoder"] = infer_encoder(tensors, order, batch_statistics=not pcrlv2)
    architecture = stated_architecture(stored.get(NNUNET_KEY))
    if architecture:
        with torch.device("meta"):  # the encoder's own description has more keys than nnU-Net's plans
            inferred["vision_encoder"] = encoder_from_metadata(describe_encoder(architecture)).metadata()
    if isinstance(stored.get("vision_encoder"), Mapping):
        own = dict(stored)
    else:
        hyper = stored["config"] if isinstance(stored.get("config"), Mapping) else stored
        options = {key: hyper[key] for key in KEPT_HYPERPARAMETERS if key in hyper}
        inferred["options"] = inferred.get("options", {}) | options
        own = {"text_encoder": hyper["tokenizer"]} if isinstance(hyper.get("tokenizer"), str) else {}
    complete = {"format_version": FORMAT_VERSION, **extra, **inferred, **own}
    if "embed_dim" in complete["vision_encoder"]:
        complete["patch_merging"] = order
    return complete


def _coverage(
    source: Mapping[str, Tensor], tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> CoverageReport:
    """Match a file with the encoder it describes; what lies outside of the encoder is carried over as it is."""
    report = match_tensors(source, {**tensors, **target})[1]
    expected = {name for name in target if not name.endswith("num_batches_tracked")}
    report.missing = sorted(name for name in report.missing if name in expected)
    report.encoder_unused += [name for name in tensors if is_encoder_entry(name, "mg3d") and name not in target]
    report.encoder_total = len(expected)
    report.encoder_loaded = len(expected.intersection(report.loaded))
    return report


def to_swin_unetr(own: OwnWeights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict for MONAI's SwinUNETR: the Swin entries, their index buffers, and encoder blocks where there are any.

    Args:
        own: weights with a Swin encoder.

    Returns:
        name -> tensor for ``load_state_dict(..., strict=False)``, and the arguments of SwinUNETR that fit.

    Raises:
        CheckpointError: the encoder is no Swin of four stages.
    """
    from mg3d.models.vision_encoders.monai_swin import swin_unetr_options

    encoder = own.metadata["vision_encoder"]
    try:
        options = swin_unetr_options(encoder)
    except ValueError as error:
        raise CheckpointError(str(error), "only Swin encoders fit SwinUNETR") from error
    found: dict[str, Tensor] = {}
    for name, value in own.tensors.items():
        rest = name.removeprefix(ENCODER_PREFIX)
        if rest != name and not rest.startswith("proj_head."):
            found[rest if _SEGMENTATION_BLOCK.match(rest) else f"swinViT.{rest}"] = value
    index = _position_index(encoder["window_size"])
    tables = [name for name in found if name.endswith("relative_position_bias_table")]
    found |= {name.replace("bias_table", "index"): index.clone() for name in tables}
    return found, options


def _position_index(window_size: Sequence[int]) -> Tensor:
    from monai.networks.nets.swin_unetr import WindowAttention

    return WindowAttention(1, 1, window_size).get_buffer("relative_position_index")
