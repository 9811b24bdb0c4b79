"""Plain values that come with weights (descriptions, configs), read and bounded before anything is built from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mg3d.errors import CheckpointError, MG3DError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Bound", "check_metadata", "check_model_size", "check_values", "read_json_object"]

MAX_JSON_BYTES = 16 * 2**20
MAX_ENTRIES = 64
"""Numbers in a list; no network has more stages."""
MAX_MODEL_GIB = 8.0
"""Parameters and buffers of a network in float32: 2 billion numbers."""


class Bound(NamedTuple):
    """Allowed values of a key.

    Attributes:
        low: least number.
        high: largest number.
        whole: only whole numbers.
        length: numbers of the list; 0 for one number or a list of any length.
    """

    low: float
    high: float
    whole: bool = True
    length: int = 0


_COUNT, _EDGE = Bound(1, 256), Bound(1, 16)
ENCODER: Mapping[str, Bound] = {
    "embed_dim": Bound(1, 4096),
    "depths": Bound(1, 128),
    "num_heads": Bound(1, 1024),
    "window_size": _EDGE,
    "patch_size": Bound(1, 32),
    "mlp_ratio": Bound(0.01, 32, whole=False),
    "drop_path_rate": Bound(0, 0.99, whole=False),
    "proj_dims": Bound(0, 16384),
    "proj_hidden_dim": Bound(0, 16384),
    "proj_out_dim": Bound(0, 16384),
    "base_width": Bound(1, 1024),
    "features_per_stage": Bound(1, 4096),
    "strides": _EDGE,
    "kernel_sizes": _EDGE,
    "blocks_per_stage": Bound(1, 128),
    "out_channels": Bound(1, 65536),
    "stride": Bound(1, 4096),
}
"""Description of an image encoder."""

_VOXELS, _MILLIMETRES = Bound(1, 1024, length=3), Bound(0.05, 20, whole=False, length=3)
PREPARATION: Mapping[str, Bound] = {
    "input_size_dhw": _VOXELS,
    "size_dhw": _VOXELS,
    "token_grid_dhw": _VOXELS,
    "crop_fractions_dhw": Bound(1e-3, 1, whole=False, length=3),
    "spacing_mm": _MILLIMETRES,
    "target_spacing_mm": _MILLIMETRES,
}
"""How a scan becomes the input."""

OPTIONS: Mapping[str, Bound] = {
    "hidden_size": Bound(1, 16384),
    "num_top_layer": _COUNT,
    "max_text_len": Bound(1, 65536),
    "vocab_size": Bound(1, 2_000_000),
    "itc_embed_dim": Bound(1, 16384),
    "volume_size": _VOXELS,
    "mim_window": Bound(1, 1024),
    "memory_queue_size": Bound(0, 1_000_000),
    "mlp_ratio": Bound(0.01, 32, whole=False),
    "cl_temp": Bound(1e-6, 1e3, whole=False),
}
"""What surrounds the encoder."""


def check_values(values: Mapping[str, Any], bounds: Mapping[str, Bound], place: str | os.PathLike[str]) -> None:
    """Refuse numbers, or lists of numbers, outside of their bounds; keys without a bound are left alone.

    Args:
        values: key -> number, list of numbers (also nested), or None.
        bounds: key -> allowed values.
        place: file, and part of it, for the message.

    Raises:
        CheckpointError: the message names key, value and bounds.
    """
    for key, bound in bounds.items():
        value = values.get(key)
        if value is None:
            continue
        listed = not bound.length or (isinstance(value, (list, tuple)) and len(value) == bound.length)
        if not listed or not _within(value, bound):
            kind = (f"{bound.length} " if bound.length else "") + ("whole numbers" if bound.whole else "numbers")
            raise CheckpointError(
                f"{place}: {key}={_short(value)} cannot be used",
                f"{kind} from {bound.low:g} to {bound.high:g} are possible; use the file as it was written",
            )


def _within(value: Any, bound: Bound, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < 2 and len(value) <= MAX_ENTRIES and all(_within(item, bound, depth + 1) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return bound.low <= value <= bound.high and (not bound.whole or value == int(value))


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_metadata(metadata: Mapping[str, Any], place: str | os.PathLike[str]) -> None:
    """Refuse a description of weights that cannot be one, before anything is built from it.

    Args:
        metadata: description stored beside weights, or content of an export folder's ``config.json``.
        place: the file, for the message.

    Raises:
        CheckpointError: a part of another kind, or a number outside of its bounds.
    """
    _check_text_places(metadata, place)
    check_values(metadata, PREPARATION, place)
    for part, bounds in (("vision_encoder", ENCODER), ("options", OPTIONS), ("geometry", PREPARATION)):
        check_values(_part(metadata, part, place), bounds, f"{place}: {part}")
    for corpus in _part(metadata, "corpora", place).values():
        if not isinstance(corpus, Mapping):
            raise _no_description(place, "corpora")
        check_values(corpus, PREPARATION, f"{place}: corpora")
    for name in ("text_encoder_config", "licence", "reports"):
        _part(metadata, name, place)


def _part(metadata: Mapping[str, Any], name: str, place: str | os.PathLike[str]) -> Mapping[str, Any]:
    part = metadata.get(name) or {}
    if not isinstance(part, Mapping):
        raise _no_description(place, name)
    return part


def _check_text_places(metadata: Mapping[str, Any], place: str | os.PathLike[str]) -> None:
    for name in ("patch_merging", "axis_order", "training_data"):
        if not isinstance(metadata.get(name, ""), (str, type(None))):
            raise _no_description(place, name)


def _no_description(place: str | os.PathLike[str], name: str) -> CheckpointError:
    return CheckpointError(f"{place}: {name} is no description", "use the file as it was written, or export it again")


def check_model_size(module: nn.Module, place: str | os.PathLike[str]) -> None:
    """Refuse a network that no machine here would hold.

    Args:
        module: the network, built on the meta device.
        place: what describes it, for the message.

    Raises:
        CheckpointError: parameters and buffers take more than :data:`MAX_MODEL_GIB`.
    """
    tensors = (*module.parameters(), *module.buffers())
    claimed = sum(value.numel() * value.element_size() for value in tensors) / 2**30
    if claimed > MAX_MODEL_GIB:
        raise CheckpointError(
            f"{place}: the described network takes {claimed:.3g} GiB, more than {MAX_MODEL_GIB:g}",
            "use the description that belongs to the weights",
        )


def read_json_object(
    path: Path,
    error_class: type[MG3DError] = CheckpointError,
    remedy: str = "copy or download the whole folder again",
) -> dict[str, Any]:
    """Content of a JSON file that holds one object.

    Args:
        path: the file.
        error_class: class of the error.
        remedy: of the error.

    Raises:
        MG3DError: no such file, too large, nested too deeply, no JSON, or no object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error_class(f"{path} takes {path.stat().st_size} bytes, more than {MAX_JSON_BYTES}", remedy)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise error_class(f"{path.parent} has no {path.name}", remedy) from error
    except RecursionError as error:
        raise error_class(f"{path} is nested too deeply", remedy) from error
    except (OSError, ValueError) as error:
        raise error_class(f"{path} cannot be read ({str(error).splitlines()[0]})", remedy) from error
    if not isinstance(content, dict):
        raise error_class(f"{path} holds a {type(content).__name__}, not an object", remedy)
    return content
