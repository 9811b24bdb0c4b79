"""Export folders: everything that is needed to use weights, and nothing about the machine they were made on.

``config.json`` (architecture), ``model.safetensors`` with ``.sha256``, ``preprocessor.json`` (from a scan to the
input), ``tokenizer/`` where the text encoder's is at hand, ``README.md`` (model card). Export then import is bit-equal.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mg3d import __version__
from mg3d.atomic import atomic_folder
from mg3d.errors import CheckpointError
from mg3d.models.bounds import check_metadata, read_json_object
from mg3d.models.conversion import OwnWeights, read_own_weights
from mg3d.models.model_card import as_json, write_card
from mg3d.models.weight_shapes import infer_encoder
from mg3d.models.weights_file import (
    FORMAT_VERSION,
    WEIGHTS_NAME,
    check_format_version,
    read_weights_file,
    save_weights,
    tensor_digest,
)

CONFIG_NAME, PREPROCESSOR_NAME, CARD_NAME, TOKENIZER_NAME = "config.json", "preprocessor.json", "README.md", "tokenizer"
PUBLISHED_TEXT_ENCODER = "StanfordAIMI/RadBERT"
PUBLISHED_VOCABULARY = 28996
NOT_STATED = "not stated"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
_PLACE = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\.\.?[\\/])|^[^\s/]+/[^\s/]+/[^\s]*$")
"""An absolute or relative path; a hub id has one slash at most."""

_DESCRIBED = ("spacing_mm", "crop_fractions_dhw", "window_hu", "axis_order")


@dataclass(frozen=True)
class ExportedModel:
    """Content of an export folder.

    Attributes:
        config: architecture and origin.
        state: name -> tensor on the CPU.
        preprocessor: how a scan becomes the input volume.
        folder: where it was read.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    preprocessor: dict[str, Any]
    folder: Path

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder of the tokenizer, if the export has one."""
        folder = self.folder / TOKENIZER_NAME
        return folder if folder.is_dir() else None


def export_folder(
    source: str | os.PathLike[str] | OwnWeights,
    out: str | os.PathLike[str],
    *,
    licence: str = NOT_STATED,
    data_licence: str = NOT_STATED,
    training_data: str = "",
    title: str = "",
    tokenizer: str | os.PathLike[str] | None = None,
    geometry: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an export folder; a crash never leaves half of one under its final name.

    Args:
        source: any accepted weights file, or weights already read.
        out: folder to make.
        licence: licence of the weights.
        data_licence: licence of the data they were trained on.
        training_data: a sentence about that data, for the model card.
        title: name of the model; the folder's name when empty.
        tokenizer: folder of the text encoder's tokenizer; the one named in the file when None.
        geometry: preparation of the volumes for files that do not record it (``spacing_mm``, ``crop_fractions_dhw``,
            ``window_hu``, ``axis_order``), see :mod:`mg3d.datasets.stored_geometry`.
        overwrite: replace an existing export folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: unreadable source, unknown preparation, or ``out`` exists.
        OutputError: no room, no permission.
    """
    out = Path(out)
    if isinstance(source, OwnWeights):
        own = source
    else:
        own = read_own_weights(source, extra=geometry)
    _check_target(out, overwrite)
    preprocessor = _preprocessor({**(geometry or {}), **own.metadata})
    place = Path(tokenizer or own.metadata.get("text_encoder") or "").expanduser()
    config = _config(own, {"code": "Apache-2.0", "weights": licence, "data": data_licence}, training_data)
    with atomic_folder(out, needed=sum(value.nbytes for value in own.tensors.values())) as partial:
        has_tokenizer = _copy_tokenizer(place, partial / TOKENIZER_NAME)
        config["text_encoder"]["tokenizer"] = TOKENIZER_NAME if has_tokenizer else None
        origin = {key: config[key] for key in ("licence", "training_data")}
        save_weights(own.tensors, partial / WEIGHTS_NAME, _without_places({**own.metadata, **origin}))
        (partial / CONFIG_NAME).write_text(as_json(config), encoding="utf-8")
        (partial / PREPROCESSOR_NAME).write_text(as_json(preprocessor), encoding="utf-8")
        (partial / CARD_NAME).write_text(write_card(config, preprocessor, title or out.name), encoding="utf-8")
    return out


def read_folder(path: str | os.PathLike[str]) -> ExportedModel:
    """Read an export folder after checking that its parts belong together.

    Args:
        path: the folder.

    Raises:
        CheckpointError: no export folder, a file of it missing, damaged or replaced, or a newer format.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no folder"
        raise CheckpointError(f"{folder} is {what}, not an export folder", "load a single file with load_weights")
    config, preprocessor = (read_json_object(folder / name) for name in (CONFIG_NAME, PREPROCESSOR_NAME))
    for content, name in ((config, CONFIG_NAME), (preprocessor, PREPROCESSOR_NAME)):
        check_format_version(content, folder / name)
        check_metadata(content, folder / name)
    if not (folder / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}", "copy or download the whole folder again")
    file = read_weights_file(folder / WEIGHTS_NAME)
    _check_together(folder, config, file.metadata, file.tensors)
    return ExportedModel(config, file.tensors, preprocessor, folder)


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists already", "choose another folder, or allow overwriting")
    if not (out / CONFIG_NAME).is_file():
        raise CheckpointError(f"{out} is no export folder and is not replaced", "choose another folder")


def _preprocessor(metadata: Mapping[str, Any]) -> dict[str, Any]:
    lacking = [key for key in (*_DESCRIBED, "input_size_dhw") if key not in metadata]
    if lacking:
        raise CheckpointError(
            f"the file does not say how volumes were prepared: {', '.join(lacking)} missing",
            "pass geometry (the published one is mg3d.datasets.stored_geometry.published_geometry())",
        )
    found = {
        "format_version": FORMAT_VERSION,
        "axis_order": metadata["axis_order"],
        "orientation": "LPS",
        "size_dhw": list(metadata["input_size_dhw"]),
        "crop_fractions_dhw": metadata["crop_fractions_dhw"],
        "target_spacing_mm": metadata["spacing_mm"],
        "window_hu": metadata["window_hu"],
    }
    return found | ({"corpora": metadata["corpora"]} if "corpora" in metadata else {})


def _config(own: OwnWeights, licence: Mapping[str, str], training_data: str) -> dict[str, Any]:
    metadata, options = own.metadata, own.metadata.get("options", {})
    recorded = {key: value for key, value in metadata.get("licence", {}).items() if value != NOT_STATED}
    stated = {key: value for key, value in licence.items() if value != NOT_STATED}
    config = {
        "format_version": FORMAT_VERSION,
        "library": "mg3d",
        "mg3d_version": metadata.get("mg3d_version", __version__),
        "architecture": metadata.get("architecture") or ("MG3DNetwork" if options else "VisionEncoder"),
        "vision_encoder": metadata["vision_encoder"],
        "patch_merging": metadata.get("patch_merging"),
        "input_size_dhw": list(metadata["input_size_dhw"]),
        "token_grid_dhw": metadata.get("token_grid_dhw"),
        "text_encoder": _text_encoder(metadata),
        "options": options,
        "hidden_size": options.get("hidden_size"),
        "shared_space": _shared_space(own.tensors),
        "has_shared_space": bool(metadata.get("has_shared_space")),
        "objectives": metadata.get("objectives") or options.get("objectives") or [],
        "datasets": metadata.get("datasets") or [],
        "reports": metadata.get("reports") or {},
        "training_data": training_data or metadata.get("training_data") or "",
        "licence": {**licence, **recorded, **stated},
        "source_commit": metadata.get("source_commit"),
        "geometry": {key: metadata[key] for key in (*_DESCRIBED, "corpora") if key in metadata},
        "weights": {
            "file": WEIGHTS_NAME,
            "entries": len(own.tensors),
            "parameters": sum(value.numel() for value in own.tensors.values()),
            "tensor_sha256": tensor_digest(own.tensors),
            "source_family": own.report.family,
        },
    }
    return _without_places(config)


def _text_encoder(metadata: Mapping[str, Any]) -> dict[str, Any]:
    architecture = metadata.get("text_encoder_config") or {}
    name = metadata.get("text_encoder")
    if name is None and architecture.get("vocab_size") == PUBLISHED_VOCABULARY:
        name = PUBLISHED_TEXT_ENCODER
    return {
        "name": name,
        "revision": metadata.get("text_encoder_revision"),
        "config": architecture,
        "vocab_size": architecture.get("vocab_size"),
        "max_text_len": metadata.get("options", {}).get("max_text_len"),
    }


def _shared_space(tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Sizes of the heads of the shared image-text space; None without one."""
    shapes = {
        part: [tuple(tensors[f"image_text_itc_head.{part}_proj.{layer}.weight"].shape) for layer in (0, 2)]
        for part in ("image", "text")
        if f"image_text_itc_head.{part}_proj.0.weight" in tensors
    }
    if len(shapes) < 2:
        return None
    (hidden, image_width), (embed_dim, _) = shapes["image"]
    return {
        "image_width": image_width,
        "text_width": shapes["text"][0][1],
        "hidden_dim": hidden,
        "embed_dim": embed_dim,
    }


def _without_places(value: Any) -> Any:
    """Copy plain values with every path of the machine cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and _PLACE.search(value):
        return Path(value.replace("\\", "/")).name
    return value


def _copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's own files, without the place they came from; False if there are none."""
    names = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if str(source) == "." or not {"tokenizer.json", "vocab.txt", "vocab.json"} & set(names):
        return False
    target.mkdir()
    for name in names:
        if name == "tokenizer_config.json":
            stored = read_json_object(source / name)
            text = as_json({key: value for key, value in stored.items() if "name_or_path" not in key})
            (target / name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source / name, target / name)
    return True


def _check_together(
    folder: Path, config: Mapping[str, Any], header: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    described, weights = config.get("vision_encoder"), config.get("weights")
    if not isinstance(described, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(f"{folder / CONFIG_NAME} describes no model", "export the model again")
    if weights.get("tensor_sha256") != tensor_digest(state):
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} holds other tensors than {CONFIG_NAME} was written for",
            "copy or download the folder again",
        )
    order = config.get("patch_merging")
    if header.get("patch_merging") != order or described.get("patch_merging", order) != order:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} says patch_merging={order!r}, the weights say {header.get('patch_merging')!r}",
            "undo the change: the order belongs to the weights",
        )
    for key, value in infer_encoder(state, str(order)).items():
        if key != "name" and described.get(key) != value:
            raise CheckpointError(
                f"{folder / CONFIG_NAME} says {key}={described.get(key)!r}, the weights have {value!r}",
                "undo the change, or export the model again",
            )
