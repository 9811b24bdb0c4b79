"""Loading weights into modules: key mapping with a coverage report, and the description stored beside weights.

Reading the files themselves is :mod:`mg3d.models.weights_file`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mg3d.errors import CheckpointError
from mg3d.models.vision_encoders.base import VisionEncoder
from mg3d.models.weights_file import (
    METADATA_KEY,
    WeightsFile,
    load_checkpoint,
    load_state_file,
    read_weights_file,
    save_weights,
    write_sidecar,
)

__all__ = [
    "METADATA_KEY",
    "CoverageReport",
    "describe_weights",
    "load_checkpoint",
    "load_state_file",
    "load_weights",
    "merging_order",
    "read_weights_file",
    "save_weights",
    "write_sidecar",
]

logger = logging.getLogger(__name__)

DROPPED_SUFFIXES = (".relative_position_index", "embeddings.position_ids", "embeddings.token_type_ids")
"""Constant buffers of old library versions; they follow from the architecture."""

_OPTIONAL_SUFFIXES = (*DROPPED_SUFFIXES, "num_batches_tracked")

ENCODER_PREFIXES = ("vision_encoder.", "swinViT.")
"""Where the image encoder lives in the project's modules and in MONAI's SwinUNETR."""

_SOURCE_PREFIXES = (*ENCODER_PREFIXES, "swin_vit.")


@dataclass
class CoverageReport:
    """What became of every tensor when weights were loaded.

    Attributes:
        loaded: names in the module that received a tensor.
        renamed: (name in the file, name in the module) of those whose name changed.
        missing: names in the module without a tensor in the file.
        unexpected: names in the file without a place in the module.
        reshaped: (name in the module, shape in the file, shape in the module) of tensors left out for their shape.
        dropped: constant buffers of old library versions, left out on purpose.
        encoder_total: entries of the module's image encoder (of the module, if it has none).
        encoder_loaded: how many of them received a tensor.
    """

    loaded: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    encoder_total: int = 0
    encoder_loaded: int = 0

    @property
    def encoder_fraction(self) -> float:
        """Share of the encoder's entries that were loaded, in [0, 1]."""
        return self.encoder_loaded / self.encoder_total if self.encoder_total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return {
            "loaded": self.loaded,
            "renamed": [list(pair) for pair in self.renamed],
            "missing": self.missing,
            "unexpected": self.unexpected,
            "reshaped": [[name, list(found), list(wanted)] for name, found, wanted in self.reshaped],
            "dropped": self.dropped,
            "encoder_loaded": self.encoder_loaded,
            "encoder_total": self.encoder_total,
        }

    def __str__(self) -> str:
        counts = ", ".join(
            f"{kind} {len(getattr(self, kind))}"
            for kind in ("loaded", "renamed", "missing", "unexpected", "reshaped", "dropped")
        )
        lines = [f"weights: {counts}; encoder {self.encoder_loaded}/{self.encoder_total}"]
        reshaped = [f"{name} {found} -> {wanted}" for name, found, wanted in self.reshaped]
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected), ("reshaped", reshaped)):
            if names:
                lines.append(f"  {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
        return "\n".join(lines)


def describe_weights(module: nn.Module, **extra: Any) -> dict[str, Any]:
    """Metadata to store beside the weights of a module: merging order and encoder description, plus ``extra``."""
    described = [part.metadata() for part in module.modules() if isinstance(part, VisionEncoder)]
    order = merging_order(module)
    return {"vision_encoder": described[0] if described else {}, **({"patch_merging": order} if order else {}), **extra}


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    min_encoder_fraction: float = 0.95,
    allow_partial: bool = False,
) -> CoverageReport:
    """Load a weights file into a module, mapping names, and log what became of every tensor.

    The module may be the pre-training network, a bare image encoder (names without prefix), or anything that holds the
    encoder as ``vision_encoder`` or ``swinViT``; the file may name it in any of these ways (spec downstream 0.4).
    Tensors of another shape are left out and reported.

    Args:
        module: receives the weights in place.
        path: the file.
        min_encoder_fraction: least share of the encoder's entries that must be loaded.
        allow_partial: accept less than that.

    Returns:
        The report, which is also logged.

    Raises:
        CheckpointError: unreadable file, other patch-merging order, or too little of the encoder covered.
    """
    file = read_weights_file(path)
    _check_merging(module, file, path)
    target = module.state_dict()
    assigned, report = _assign(file.tensors, target)
    _count_encoder(report, target)
    if report.encoder_fraction < min_encoder_fraction and not allow_partial:
        raise CheckpointError(
            f"{path} covers only {report.encoder_loaded} of {report.encoder_total} entries of the encoder\n{report}",
            "choose the encoder and sizes the file was made with, or load with allow_partial",
        )
    module.load_state_dict(assigned, strict=False)
    logger.info("%s: %s", path, report)
    return report


def merging_order(module: nn.Module) -> str | None:
    """Patch-merging order of the first Swin encoder inside a module; None without one."""
    for part in module.modules():
        order = getattr(part, "patch_merging", None)
        if isinstance(order, str):
            return order
        if type(part).__name__.startswith("PatchMerging") and type(part).__module__.startswith("monai."):
            return "fixed" if type(part).__name__ == "PatchMerging" else "mergingv2"
    return None


def _stored_order(metadata: Mapping[str, Any]) -> str:
    """Merging order a file was made with; files that say nothing are the published ones."""
    for place in (metadata, metadata.get("vision_encoder"), metadata.get("config")):
        if isinstance(place, Mapping) and isinstance(place.get("patch_merging"), str):
            return place["patch_merging"]
    return "legacy"


def _check_merging(module: nn.Module, file: WeightsFile, path: str | os.PathLike[str]) -> None:
    wanted = merging_order(module)
    if wanted is None or not any(".downsample.reduction." in name for name in file.tensors):
        return
    stored = _stored_order(file.metadata)
    if stored != wanted:
        raise CheckpointError(
            f"{path} was trained with patch_merging={stored!r}, the model is built with {wanted!r}: the names agree, "
            "the features would not",
            f"build the model with patch_merging={stored}",
        )


def _candidates(key: str) -> Iterable[str]:
    """Names a tensor may have in a module, best first."""
    key = key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
    yield key
    rest = next((key[len(prefix) :] for prefix in _SOURCE_PREFIXES if key.startswith(prefix)), key)
    for prefix in ("", *ENCODER_PREFIXES):
        yield prefix + rest


def _assign(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], CoverageReport]:
    report = CoverageReport()
    assigned: dict[str, Tensor] = {}
    for key, value in source.items():
        name = next((name for name in _candidates(key) if name in target and name not in assigned), None)
        if name is None:
            (report.dropped if key.endswith(DROPPED_SUFFIXES) else report.unexpected).append(key)
        elif value.shape != target[name].shape:
            report.reshaped.append((name, tuple(value.shape), tuple(target[name].shape)))
        else:
            assigned[name] = value
            if name != key:
                report.renamed.append((key, name))
    report.loaded = list(assigned)
    left_out = {name for name, _, _ in report.reshaped}
    expected = [name for name in target if not name.endswith(_OPTIONAL_SUFFIXES)]
    report.missing = [name for name in expected if name not in assigned and name not in left_out]
    return assigned, report


def _count_encoder(report: CoverageReport, target: Mapping[str, Tensor]) -> None:
    expected = [name for name in target if not name.endswith(_OPTIONAL_SUFFIXES)]
    encoder = [name for name in expected if name.startswith(ENCODER_PREFIXES)] or expected
    loaded = set(report.loaded)
    report.encoder_total = len(encoder)
    report.encoder_loaded = sum(name in loaded for name in encoder)
