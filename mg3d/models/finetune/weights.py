"""The image encoder of a fine-tuning run: built in the sizes of its weights, and loaded with a report.

The encoder may sit anywhere in a module; beside it, only the segmentation blocks ``encoder1..4`` and ``encoder10`` that
some files carry are taken (spec downstream 0.4). Decoders and heads always start at random.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mg3d.errors import CheckpointError, ConfigError, MG3DError
from mg3d.models.checkpoint import (
    CoverageReport,
    check_coverage,
    check_dtypes,
    check_merging,
    match_tensors,
    merging_order,
    stored_merging,
)
from mg3d.models.conversion import read_own_weights
from mg3d.models.finetune.text_weights import LANGUAGE, required_text_entries
from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder, encoder_from_metadata
from mg3d.models.weight_maps import TEXT_FAMILIES
from mg3d.models.weights_file import read_weights_file

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["build_encoder", "load_encoder_weights"]

logger = logging.getLogger(__name__)

OTHER_PART = "not part of the image encoder"
OTHER_TEXT = "text encoder of other sizes: the run keeps its own"
_PLACE = "vision_encoder."
_NETWORK = "network."
_BLOCKS = re.compile(r"encoder(1|2|3|4|10)\.")
_BLOCK_ANYWHERE = re.compile(r"^.*?\b(encoder(?:1|2|3|4|10)\.)")
_NNUNET_WIDTHS = (1, 2, 4, 8, 10, 10)


def build_encoder(cfg: FinetuneConfig) -> VisionEncoder:
    """Build the image encoder of a run, randomly initialised.

    With ``weights`` the sizes are those that the file describes, or that its shapes tell, also with ``scratch``; else
    they are the registry's, scaled to ``feature_size``. ``patch_merging=auto`` is the order of the weights (legacy for
    files that do not say), and fixed without weights.

    Args:
        cfg: reads ``encoder``, ``feature_size``, ``patch_merging``, ``gradient_checkpointing``, ``weights``.

    Raises:
        ConfigError: the weights hold an encoder of another family or width, or sizes that cannot be built.
        CheckpointError: unreadable weights.
    """
    described = _described(cfg) if cfg.weights else {}
    order = str(described.get("patch_merging") or "fixed") if cfg.patch_merging == "auto" else cfg.patch_merging
    try:
        if described:
            described |= {"patch_merging": order, "gradient_checkpointing": cfg.gradient_checkpointing}
            return encoder_from_metadata(described)
        sizes = _sizes(cfg.encoder, cfg.feature_size) if cfg.feature_size else {}
        return create_vision_encoder(
            cfg.encoder, patch_merging=order, gradient_checkpointing=cfg.gradient_checkpointing, **sizes
        )
    except ValueError as error:
        if isinstance(error, MG3DError):
            raise
        raise ConfigError(
            f"encoder={cfg.encoder} cannot be built: {error}", "change feature_size or encoder"
        ) from error


def _described(cfg: FinetuneConfig) -> dict[str, Any]:
    """Description of the encoder in a weights file; empty when its shapes are not recognised."""
    given = None if cfg.patch_merging == "auto" else cfg.patch_merging
    own = read_own_weights(cfg.weights, patch_merging=given, allow_partial=True, cast=True)
    if own.report.family in TEXT_FAMILIES:
        raise ConfigError(
            f"weights={cfg.weights} is a CT-CLIP checkpoint: a text encoder beside another image encoder than ours",
            "give MG-3D's file as weights=; the CT-RATE benchmark takes this one as text_weights=",
        )
    found = dict(own.metadata.get("vision_encoder") or {})
    name = str(found.get("name", cfg.encoder))
    if name.split("_")[0] != cfg.encoder.split("_")[0]:
        raise ConfigError(f"encoder={cfg.encoder}, but {cfg.weights} holds the encoder {name}", f"write encoder={name}")
    widths = (found.get("embed_dim"), found.get("base_width"), (found.get("features_per_stage") or [None])[0])
    width = next((each for each in widths if each), None)
    if cfg.feature_size and width and cfg.feature_size != width:
        raise ConfigError(
            f"feature_size={cfg.feature_size}, but the encoder in {cfg.weights} has {width}",
            "write feature_size=0, the size follows from the weights",
        )
    if "embed_dim" in found:
        found["patch_merging"] = own.metadata.get("patch_merging") or "legacy"
    return found


def _sizes(name: str, width: int) -> dict[str, Any]:
    """Options of an encoder whose first map has ``width`` channels, the others in the published proportion."""
    if name.startswith("swin"):
        return {"embed_dim": width}
    if name.startswith("unet"):
        return {"base_width": width}
    return {"features_per_stage": [width * factor for factor in _NNUNET_WIDTHS]}


def load_encoder_weights(module: nn.Module, cfg: FinetuneConfig, also: tuple[str, ...] = ()) -> CoverageReport:
    """Load pre-trained weights into the encoder of a module, and log what became of every tensor.

    Args:
        module: has the encoder as ``encoder``, itself or deeper (for example inside a SwinUNETR); changed in place.
        cfg: reads ``weights`` and ``allow_partial``.
        also: first parts of the names of further tensors to take, for example ``language_encoder.``.

    Returns:
        The report, with names relative to the network that holds the encoder (the encoder is ``vision_encoder``).

    Raises:
        CheckpointError: unreadable file, other patch-merging order or dtype, or less than 95 % of the encoder covered
            without ``allow_partial``; the message names the first tensor of another shape.
    """
    file = read_weights_file(cfg.weights)
    target = _target(module)
    found, report = match_tensors(file.tensors, target)
    taken = {name: value for name, value in found.items() if _is_encoder(name) or name.startswith(also)}
    other_text = any(name not in taken for name in required_text_entries(list(target)))
    if other_text:  # half of one text encoder and half of another would read nothing
        taken = {name: value for name, value in taken.items() if not name.startswith(LANGUAGE)}
    _leave_out(report, found, taken, OTHER_TEXT if LANGUAGE in also else OTHER_PART)
    if report.has_merging:
        given = None if cfg.patch_merging == "auto" else cfg.patch_merging
        stored = stored_merging(file, given, cfg.weights)
        report.patch_merging = check_merging(merging_order(module), stored, cfg.weights)
    check_dtypes(taken, {name: value.dtype for name, value in target.items()}, cfg.weights, cast=True)
    check_coverage(report, cfg.weights, 0.0 if cfg.allow_partial else 0.95)
    for name, value in taken.items():
        target[name].copy_(value)
    logger.info("%s: %s", cfg.weights, report)
    return report


def _target(module: nn.Module) -> dict[str, Tensor]:
    """Live tensors of a module: the encoder's under ``vision_encoder.``, segmentation blocks under their bare name."""
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise CheckpointError(f"{type(module).__name__} has no image encoder", "give a module with an encoder")
    inside = encoder.state_dict()
    places = {value.data_ptr() for value in inside.values()}
    target = {_PLACE + name: value for name, value in inside.items()}
    for name, value in module.state_dict().items():
        if value.data_ptr() not in places:
            target[_BLOCK_ANYWHERE.sub(r"\1", name.removeprefix(_NETWORK))] = value
    return target


def _leave_out(report: CoverageReport, found: Mapping[str, Tensor], taken: Mapping[str, Tensor], of_text: str) -> None:
    """Correct a report for tensors that matched by chance of their name, or that are left out; ``of_text``: why."""
    origin = {here: there for there, here in report.renamed}
    extra = [name for name in found if name not in taken]
    why = {name: of_text if name.startswith(LANGUAGE) else OTHER_PART for name in extra}
    report.dropped |= {origin.get(name, name): reason for name, reason in why.items()}
    report.loaded = [name for name in report.loaded if name in taken]
    report.renamed = [pair for pair in report.renamed if pair[1] in taken]
    report.missing += extra


def _is_encoder(name: str) -> bool:
    return name.startswith(_PLACE) or _BLOCKS.match(name) is not None
