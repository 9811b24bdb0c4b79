"""Weights of a report writer: from a pre-trained MG-3D module, or from a report writer itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from mg3d.errors import CheckpointError
from mg3d.models.checkpoint import CoverageReport, load_weights, match_tensors, read_weights_file
from mg3d.models.language_encoders import BertTextEncoder

if TYPE_CHECKING:
    from mg3d.models.clm.module import ReportWritingModule

__all__ = ["initialise"]

log = logging.getLogger(__name__)

IMAGE_SIDE = ("vision_encoder", "multi_modal_vision_proj", "modality_type_embeddings")
HEAD, TEXT = "clm_head.", "language_encoder."
UNUSED = "pooler."


def initialise(module: ReportWritingModule) -> dict[str, Any]:
    """Give a new module its first weights: those of ``load_path``, if any, and the text encoder's for the decoder.

    A file that holds a report head is taken whole. Of any other file the image side is taken, and its text encoder for
    the decoder, where that has the same vocabulary and sizes; else the decoder starts from the config's text encoder.

    Args:
        module: the new module; changed in place.

    Returns:
        The report for ``weights_report.json``: coverage by name where there is a file, and the decoder's origin.

    Raises:
        CheckpointError: a file that cannot be used.
    """
    cfg, text = module.cfg, module.release_text_encoder()
    origin = "random text encoder" if cfg.text_encoder_random_init else f"text encoder {cfg.tokenizer}"
    report: dict[str, Any] = {}
    if cfg.load_path:
        file = read_weights_file(cfg.load_path)
        if any(name.startswith(HEAD) for name in file.tensors):
            return {**_whole(module).as_dict(), "decoder": {"from": "report writer of load_path"}}
        parts = nn.ModuleDict({name: getattr(module, name) for name in IMAGE_SIDE})
        report = load_weights(parts, cfg.load_path, allow_partial=cfg.load_partial).as_dict()
        if _take_text_encoder(text, file.tensors):
            module.clm_head.copy_from(text)
            origin = "text encoder of load_path"
    copied = module.clm_head.initialisation
    log.info(
        "decoder: %d parameters copied from the %s, %d new: %s",
        len(copied.copied),
        origin,
        len(copied.new),
        "cross-attention and the bias over the words",
    )
    return {**report, "decoder": {"from": origin, "copied": list(copied.copied), "new": list(copied.new)}}


def _whole(module: ReportWritingModule) -> CoverageReport:
    """Load a report writer's own weights; nothing may be left out."""
    cfg = module.cfg
    report = load_weights(module, cfg.load_path, allow_partial=cfg.load_partial)
    if report.missing or report.reshaped:
        first = (report.missing or [name for name, _, _ in report.reshaped])[0]
        raise CheckpointError(
            f"{cfg.load_path} is of another report writer: {len(report.missing)} tensors missing, "
            f"{len(report.reshaped)} of another shape, first {first}",
            "use the config of that run (its config.json)",
        )
    return report


def _take_text_encoder(text: BertTextEncoder, tensors: dict[str, Any]) -> bool:
    """Load a file's text encoder where every tensor but the unused pooler fits; says so where it does not."""
    target = {f"{TEXT}{name}": value for name, value in text.state_dict().items() if not name.startswith(UNUSED)}
    held = {name: value for name, value in tensors.items() if name.startswith(TEXT)}
    found, _ = match_tensors(held, target)
    if found.keys() == target.keys():
        text.load_state_dict({name.removeprefix(TEXT): value for name, value in found.items()}, strict=False)
        return True
    if held:
        log.info("load_path holds another text encoder than the config's: the decoder starts from the config's")
    return False
