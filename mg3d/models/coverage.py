"""What became of every tensor of a weights file, and when that is not enough to use it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from mg3d.errors import CheckpointError
from mg3d.models.weight_maps import RESIDUAL_BLOCK, SUPPORTED, WITHOUT_ENCODER, is_foreign

__all__ = ["CoverageReport", "check_coverage", "check_known"]

logger = logging.getLogger(__name__)


@dataclass
class CoverageReport:
    """What became of every tensor when weights were loaded.

    Attributes:
        loaded: names in the module that received a tensor.
        renamed: (name in the file, name in the module) of those whose name changed.
        missing: names in the module without a tensor in the file.
        unexpected: names in the file without a place in the module.
        reshaped: (name in the module, shape in the file, shape in the module) of tensors left out for their shape.
        dropped: names in the file that are left out on purpose, each with the reason.
        encoder_unused: names in the file of its image encoder that found no place or had another shape.
        encoder_total: entries of the module's image encoder (of the module, if it has none).
        encoder_loaded: how many of them received a tensor.
        family: layout of the file, see :mod:`mg3d.models.weight_maps`.
        has_merging: the file holds patch-merging layers.
        patch_merging: order in which these were trained; empty if there are none.
    """

    loaded: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    encoder_unused: list[str] = field(default_factory=list)
    encoder_total: int = 0
    encoder_loaded: int = 0
    family: str = "unknown"
    has_merging: bool = False
    patch_merging: str = ""

    @property
    def encoder_fraction(self) -> float:
        """Share of the encoder's entries that were loaded, in [0, 1]."""
        return self.encoder_loaded / self.encoder_total if self.encoder_total else 0.0

    def counts(self) -> dict[str, int]:
        """Number of entries by what became of them."""
        kinds = ("loaded", "renamed", "missing", "unexpected", "reshaped", "dropped")
        return {kind: len(getattr(self, kind)) for kind in kinds}

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        plain = asdict(self)
        plain["renamed"] = [list(pair) for pair in self.renamed]
        plain["reshaped"] = [[name, list(found), list(wanted)] for name, found, wanted in self.reshaped]
        return plain

    def __str__(self) -> str:
        counts = ", ".join(f"{kind} {count}" for kind, count in self.counts().items())
        order = f", {self.patch_merging} merging" if self.patch_merging else ""
        lines = [f"weights ({self.family}{order}): {counts}; encoder {self.encoder_loaded}/{self.encoder_total}"]
        reshaped = [f"{name} {found} -> {wanted}" for name, found, wanted in self.reshaped]
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected), ("reshaped", reshaped)):
            if names:
                lines.append(f"  {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
        lines += [f"  dropped: {count} ({reason})" for reason, count in Counter(self.dropped.values()).items()]
        return "\n".join(lines)


def check_known(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse a file in which nothing is recognised.

    Raises:
        CheckpointError: the message counts the tensors by the first part of their names.
    """
    if not is_foreign(tensors):
        return
    parts = Counter(name.split(".")[0] for name in tensors).most_common()
    listed = ", ".join(f"{part} ({count})" for part, count in parts[:6]) + (", ..." if len(parts) > 6 else "")
    raise CheckpointError(
        f"{path}: no supported family of weights was recognised; its {len(tensors)} tensors are under {listed}",
        f"give weights of {SUPPORTED}, or rename the tensors as one of these names them",
    )


def check_coverage(report: CoverageReport, path: str | os.PathLike[str], least: float = 0.95) -> None:
    """Refuse a file that covers too little of the encoder, or whose encoder has tensors that found no place.

    Args:
        report: what became of every tensor.
        path: name of the file, for the message.
        least: least covered share; 0 accepts anything and only warns of tensors without a place.

    Raises:
        CheckpointError: the covered share is below ``least``; the message holds the report. Or tensors of the file's
            encoder are left over: it is another encoder, whose features would differ.
    """
    unused, lacking = report.encoder_unused, [name for name in report.missing if RESIDUAL_BLOCK.search(name)]
    if least <= 0:
        if unused:
            logger.warning("%s: %d tensors of its image encoder are not used, first %s", path, len(unused), unused[0])
        return
    if not report.encoder_total and report.family not in WITHOUT_ENCODER:
        raise CheckpointError(
            f"{path}: the sizes of its image encoder are not known (layout: {report.family})",
            "use a file with its description: an export folder, a checkpoint of this project, nnU-Net's own checkpoint",
        )
    if lacking and report.encoder_total - report.encoder_loaded == len(lacking):
        raise CheckpointError(
            f"{path} has no residual blocks ({lacking[0]}), the model is built with them (SwinUNETR v2)",
            "leave out residual_blocks=True, or give weights of SwinUNETR v2",
        )
    if report.encoder_fraction < least:
        raise CheckpointError(
            f"{path} covers only {report.encoder_loaded} of {report.encoder_total} entries of the encoder\n{report}",
            f"{WITHOUT_ENCODER[report.family]} only: load with allow_partial to take just that"
            if report.family in WITHOUT_ENCODER
            else "choose the encoder and sizes the file was made with, or load with allow_partial",
        )
    if unused:
        raise _left_over(report, path)


def _left_over(report: CoverageReport, path: str | os.PathLike[str]) -> CheckpointError:
    unused = report.encoder_unused
    blocks = next((name for name in unused if RESIDUAL_BLOCK.search(name)), None)
    if blocks:
        return CheckpointError(
            f"{path} is a SwinUNETR v2 (use_v2=True): its residual blocks ({blocks} and {len(unused) - 1} more) have "
            "no place in the model",
            "build the encoder with residual_blocks=True (vision_encoder_options.residual_blocks=True)",
        )
    return CheckpointError(
        f"{path} holds {len(unused)} tensors of its image encoder that the model has no place for, first {unused[0]}: "
        "without them the features are others",
        "choose the encoder and sizes the file was made with, or load with allow_partial",
    )
