"""Loading weights into modules: key mapping with a coverage report, and the description stored beside weights.

Reading the files themselves is :mod:`mg3d.models.weights_file`, what their names mean :mod:`mg3d.models.weight_maps`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.errors import CheckpointError
from mg3d.models.coverage import CoverageReport, check_coverage, check_known
from mg3d.models.vision_encoders.base import VisionEncoder
from mg3d.models.weight_maps import (
    CONSTANT,
    CONSTANT_SUFFIXES,
    WITHOUT_ENCODER,
    Translation,
    is_encoder_entry,
    translate,
)
from mg3d.models.weights_file import (
    FORMAT_VERSION,
    METADATA_KEY,
    WeightsFile,
    check_format_version,
    load_checkpoint,
    load_state_file,
    read_weights_file,
    save_weights,
    write_sidecar,
)

__all__ = [
    "METADATA_KEY",
    "CoverageReport",
    "check_coverage",
    "check_dtypes",
    "check_known",
    "check_merging",
    "check_resumable",
    "describe_weights",
    "load_checkpoint",
    "load_state_file",
    "load_weights",
    "match_tensors",
    "merging_order",
    "read_weights_file",
    "save_weights",
    "says_merging",
    "stored_merging",
    "write_sidecar",
]

logger = logging.getLogger(__name__)

_OPTIONAL_SUFFIXES = (*CONSTANT_SUFFIXES, "num_batches_tracked")

ENCODER_PREFIXES = ("vision_encoder.", "swinViT.")
"""Where the image encoder lives in the project's modules and in MONAI's SwinUNETR."""

_RESUME_MEND = "resume with the config of that run (its config.json), or start a new one with load_path"

_LEARNED_SUMS = ("fc1.weight", "fc2.weight")


def describe_weights(module: nn.Module, **extra: Any) -> dict[str, Any]:
    """Metadata to store beside the weights of a module: format, merging order, encoder description, and ``extra``."""
    described = [part.metadata() for part in module.modules() if isinstance(part, VisionEncoder)]
    order = merging_order(module)
    return {
        "format_version": FORMAT_VERSION,
        "vision_encoder": described[0] if described else {},
        **({"patch_merging": order} if order else {}),
        **extra,
    }


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    min_encoder_fraction: float = 0.95,
    allow_partial: bool = False,
    patch_merging: str | None = None,
    cast: bool = False,
) -> CoverageReport:
    """Load a weights file into a module, mapping names, and log what became of every tensor.

    The module may be the pre-training network, a bare image encoder (names without prefix), or anything that holds the
    encoder as ``vision_encoder`` or ``swinViT``; the file may come from any program that
    :mod:`mg3d.models.weight_maps` lists (spec downstream 0.4). Tensors of another shape are left out and reported.

    Args:
        module: receives the weights in place; nothing changes when an error is raised.
        path: the file, or an export folder.
        min_encoder_fraction: least share of the encoder's entries that must be loaded.
        allow_partial: accept less than that.
        patch_merging: order the file was made with, for files that do not say (``legacy`` when None).
        cast: accept floating-point tensors of another precision, for example float16.

    Returns:
        The report, which is also logged.

    Raises:
        CheckpointError: unreadable or unknown file, other patch-merging order, other dtype, too little of the encoder
            covered, or tensors of the file's encoder left over.
    """
    file = read_weights_file(path)
    target = module.state_dict()
    if not any(name in target for name in file.tensors):
        check_known(file.tensors, path)
    assigned, report = match_tensors(file.tensors, target)
    if not assigned:
        check_known(file.tensors, path)
    if any(name.startswith("vision_encoder.") for name in target):  # its tokens would be those behind the head
        report.encoder_unused += [name for name in report.unexpected if "proj_head." in name]
    if report.has_merging:
        report.patch_merging = check_merging(merging_order(module), stored_merging(file, patch_merging, path), path)
    check_dtypes(assigned, {name: value.dtype for name, value in target.items()}, path, cast=cast)
    check_coverage(report, path, 0.0 if allow_partial else min_encoder_fraction)
    module.load_state_dict(assigned, strict=False)
    logger.info("%s: %s", path, report)
    _warn_learned_sums(module, report)
    return report


def check_resumable(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another model, before anything of it is used.

    Args:
        module: the model of the run.
        checkpoint: content of the checkpoint.

    Raises:
        CheckpointError: newer format, other merging order, other names, shapes or dtypes.
    """
    place = "the checkpoint to resume"
    metadata = checkpoint.get(METADATA_KEY) or {}
    check_format_version(metadata, place)
    order = says_merging(metadata)
    if order:
        check_merging(merging_order(module), order, place)
    if "state_dict" in checkpoint:
        stored = checkpoint["state_dict"]
        if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
            raise CheckpointError(f"{place} holds no tensors under state_dict", _RESUME_MEND)
        _check_same_tensors(stored, module.state_dict(), place)


def _check_same_tensors(stored: Mapping[str, Tensor], target: Mapping[str, Tensor], place: str) -> None:
    shapes = [name for name in stored if name in target and stored[name].shape != target[name].shape]
    if shapes:
        found, wanted = tuple(stored[shapes[0]].shape), tuple(target[shapes[0]].shape)
        raise CheckpointError(
            f"{place} does not fit: {len(shapes)} tensors of another shape, first {shapes[0]} {found}, not {wanted}",
            _RESUME_MEND,
        )
    absent = target.keys() - stored.keys()
    unknown = {name for name in stored.keys() - target.keys() if not name.endswith(CONSTANT_SUFFIXES)}
    if absent or unknown:
        first = min(absent | unknown)
        raise CheckpointError(
            f"{place} does not fit: {len(absent)} tensors missing, {len(unknown)} unknown, first {first}", _RESUME_MEND
        )
    known = {name: value for name, value in stored.items() if name in target}
    check_dtypes(known, {name: target[name].dtype for name in known}, place)


def merging_order(module: nn.Module) -> str | None:
    """Patch-merging order of the first Swin encoder inside a module; None without one."""
    for part in module.modules():
        order = getattr(part, "patch_merging", None)
        if isinstance(order, str):
            return order
        if type(part).__name__.startswith("PatchMerging") and type(part).__module__.startswith("monai."):
            return "fixed" if type(part).__name__ == "PatchMerging" else "mergingv2"
    return None


def says_merging(metadata: Mapping[str, Any]) -> str | None:
    """Merging order in the description of a file; None if it does not say."""
    for place in (metadata, metadata.get("vision_encoder"), metadata.get("config")):
        if isinstance(place, Mapping) and isinstance(place.get("patch_merging"), str):
            return place["patch_merging"]
    return None


def stored_merging(file: WeightsFile, given: str | None = None, path: str | os.PathLike[str] = "the file") -> str:
    """Merging order a file was made with.

    Args:
        file: content of the file.
        given: what the caller knows about a file that does not say.
        path: name of the file, for the message.

    Returns:
        The order in the metadata; else ``given``; else ``legacy``, that of all published files.

    Raises:
        CheckpointError: ``given`` contradicts the metadata.
    """
    said = says_merging(file.metadata)
    if said and given and said != given:
        raise CheckpointError(f"{path} says patch_merging={said!r}, not {given!r}", f"leave out patch_merging={given}")
    return said or given or "legacy"


def check_merging(wanted: str | None, stored: str, path: str | os.PathLike[str]) -> str:
    """Refuse Swin weights of another merging order than the model's (None: the model has none), else return theirs.

    Raises:
        CheckpointError: the orders differ.
    """
    if wanted is not None and stored != wanted:
        raise CheckpointError(
            f"{path} was trained with patch_merging={stored!r}, the model is built with {wanted!r}: the names agree, "
            "the features would not",
            f"build the model with patch_merging={stored}",
        )
    return stored


def check_dtypes(
    found: Mapping[str, Tensor], wanted: Mapping[str, torch.dtype], path: str | os.PathLike[str], *, cast: bool = False
) -> None:
    """Refuse tensors whose dtype is not the wanted one: half precision lost digits, quantised numbers mean others.

    Args:
        found: name -> tensor of the file.
        wanted: name -> dtype in the model; float32 also fits models of lower precision.
        path: name of the file, for the message.
        cast: any floating-point dtype fits any other.

    Raises:
        CheckpointError: a dtype does not fit.
    """
    wrong = [name for name, value in found.items() if not _fits(value.dtype, wanted[name], cast)]
    if wrong:
        dtype = found[wrong[0]].dtype
        raise CheckpointError(
            f"{path} holds {len(wrong)} tensors of another dtype: {wrong[0]} is {dtype}, expected {wanted[wrong[0]]}",
            "use the full-precision file, or python tools/convert_meter_weights.py FILE OUT --to mg3d --cast-float32"
            if dtype.is_floating_point
            else "use the file that was saved before quantisation",
        )


def _fits(found: torch.dtype, wanted: torch.dtype, cast: bool) -> bool:
    if found == wanted or (found == torch.float32 and wanted.is_floating_point):
        return True
    return cast and found.is_floating_point and wanted.is_floating_point


def _warn_learned_sums(module: nn.Module, report: CoverageReport) -> None:
    """Published files hold these unused layers for 384 or 48 tokens; only two variants of the fusion use them."""
    variant = getattr(getattr(module, "options", None), "fusion_variant", "mean")
    left_out = [name for name, _, _ in report.reshaped if name.endswith(_LEARNED_SUMS) and "cross_multihead" in name]
    if left_out and variant != "mean":
        logger.warning("fusion_variant=%s uses %s, which stay random: another length", variant, ", ".join(left_out))


def _candidates(name: str) -> Iterable[str]:
    """Names a tensor may have in a module, best first."""
    yield name
    rest = next((name[len(prefix) :] for prefix in ENCODER_PREFIXES if name.startswith(prefix)), name)
    for prefix in ("", *ENCODER_PREFIXES):
        yield prefix + rest


def match_tensors(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], CoverageReport]:
    """Find the place of every entry of a file in a state dict.

    Args:
        source: name -> tensor of the file, outer prefixes removed.
        target: state dict of the module; only names and shapes are used.

    Returns:
        name in the target -> tensor of the file, and the report.
    """
    translation = translate(source)
    assigned, report = _assign(source, translation, target)
    report.has_merging = any(".downsample.reduction." in name for name in translation.names)
    _count_encoder(report, target)
    return assigned, report


def _assign(
    source: Mapping[str, Tensor], translation: Translation, target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], CoverageReport]:
    report = CoverageReport(family=translation.family)
    assigned: dict[str, Tensor] = {}
    foreign = translation.family in WITHOUT_ENCODER
    for key, value in source.items():
        if key in translation.dropped and (foreign or key not in target):
            report.dropped[key] = translation.dropped[key]
            continue
        places = (key, *_candidates(translation.names.get(key, key)))
        name = next((name for name in places if name in target and name not in assigned), None)
        if name is None and key.endswith(CONSTANT_SUFFIXES):
            report.dropped[key] = CONSTANT
        elif name is None or value.shape != target[name].shape:
            if name is None:
                report.unexpected.append(key)
            else:
                report.reshaped.append((name, tuple(value.shape), tuple(target[name].shape)))
            if is_encoder_entry(translation.names.get(key, key), translation.family) and not _is_head(key, name):
                report.encoder_unused.append(key)
        else:
            assigned[name] = value
            if name != key:
                report.renamed.append((key, name))
    report.loaded = list(assigned)
    left_out = {name for name, _, _ in report.reshaped}
    expected = [name for name in target if not name.endswith(_OPTIONAL_SUFFIXES)]
    report.missing = [name for name in expected if name not in assigned and name not in left_out]
    return assigned, report


def _is_head(key: str, place: str | None) -> bool:
    """Whether an entry without a place is a projection head, which decoders and SwinUNETR do without."""
    return place is None and ("proj_head." in key or key.endswith(_OPTIONAL_SUFFIXES))


def _count_encoder(report: CoverageReport, target: Mapping[str, Tensor]) -> None:
    expected = [name for name in target if not name.endswith(_OPTIONAL_SUFFIXES)]
    encoder = [name for name in expected if name.startswith(ENCODER_PREFIXES)] or expected
    loaded = set(report.loaded)
    report.encoder_total = len(encoder)
    report.encoder_loaded = sum(name in loaded for name in encoder)
