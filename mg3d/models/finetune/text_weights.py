"""The text side of a vocabulary run from a weights file: CT-CLIP's, or one pre-trained here (spec downstream 7.4)."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from mg3d.errors import CheckpointError
from mg3d.models.checkpoint import CoverageReport, check_dtypes, match_tensors
from mg3d.models.weights_file import read_weights_file

__all__ = ["LANGUAGE", "load_text_weights", "required_text_entries"]

logger = logging.getLogger(__name__)

LANGUAGE = "language_encoder."
TEXT_LATENT, TEMPERATURE = "to_text_latent.weight", "temperature"
NO_TEXT = "not part of the text side"
_UNUSED = f"{LANGUAGE}pooler."


def required_text_entries(names: list[str]) -> list[str]:
    """Entries of a text encoder that a file must have: all but the pooler, which is not used."""
    return [name for name in names if name.startswith(LANGUAGE) and not name.startswith(_UNUSED)]


def load_text_weights(network: nn.Module, path: str, *, latents_out: str = "") -> CoverageReport:
    """Load text encoder, temperature and the latent projection of texts, and log what became of every tensor.

    Args:
        network: has ``language_encoder``, ``to_text_latent`` and ``temperature``; changed in place.
        path: the file; of CT-CLIP or any with ``language_encoder.`` entries.
        latents_out: why the latent projection stays as it is; empty takes it where it fits.

    Returns:
        The report; its encoder is the text encoder.

    Raises:
        CheckpointError: unreadable file, no text encoder in it, or one of other sizes than the network's.
    """
    if not Path(path).exists():
        raise CheckpointError(f"no file text_weights={path}", "name a CT-CLIP or MG-3D checkpoint")
    file = read_weights_file(path)
    target = {
        name: value
        for name, value in network.state_dict().items()
        if name.startswith(LANGUAGE) or name in (TEXT_LATENT, TEMPERATURE)
    }
    found, report = match_tensors(file.tensors, target)
    report.dropped |= dict.fromkeys(report.unexpected, NO_TEXT)
    report.unexpected = []
    _check_complete(report, required_text_entries(list(target)), path)
    _leave_latents_out(report, found, latents_out)
    check_dtypes(found, {name: value.dtype for name, value in target.items()}, path, cast=True)
    for name, value in found.items():
        target[name].copy_(value)
    logger.info("%s: text %s", path, report)
    return report


def _check_complete(report: CoverageReport, required: list[str], path: str) -> None:
    loaded = set(report.loaded)
    report.encoder_total, report.encoder_loaded = len(required), sum(name in loaded for name in required)
    report.has_merging, report.patch_merging = False, ""
    wrong = [entry for entry in report.reshaped if entry[0] in required]
    absent = [name for name in required if name in report.missing]
    if not report.encoder_loaded and not wrong:
        raise CheckpointError(
            f"text_weights={path} holds no text encoder (layout: {report.family})",
            "name a CT-CLIP or MG-3D checkpoint, or leave text_weights out",
        )
    if wrong or absent:
        first = f"first {wrong[0][0]} {wrong[0][1]}, not {wrong[0][2]}" if wrong else f"first {absent[0]}"
        raise CheckpointError(
            f"text_weights={path} does not fit text_encoder=: {len(wrong)} tensors of another shape, {len(absent)} "
            f"missing, {first}",
            "set text_encoder= to the one of the file (CT-CLIP: microsoft/BiomedVLP-CXR-BERT-specialized)",
        )


def _leave_latents_out(report: CoverageReport, found: dict[str, Tensor], reason: str) -> None:
    for name, stored, wanted in list(report.reshaped):
        if name == TEXT_LATENT:
            reason = (
                reason or f"latent projection {stored}, not {wanted}: latent={stored[0]} width={stored[1]} takes it"
            )
            report.reshaped.remove((name, stored, wanted))
            report.dropped[TEXT_LATENT] = reason
    if reason and TEXT_LATENT in found:
        del found[TEXT_LATENT]
        report.loaded.remove(TEXT_LATENT)
        report.dropped[TEXT_LATENT] = reason
        report.missing.append(TEXT_LATENT)
