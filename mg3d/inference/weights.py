"""From a weights file of any kind to a network in evaluation mode, with a report of what was loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.datasets.stored_geometry import published_geometry
from mg3d.errors import CheckpointError, MG3DError
from mg3d.inference.places import Place
from mg3d.models.bounds import check_model_size, read_json_object
from mg3d.models.checkpoint import CoverageReport, check_coverage, match_tensors
from mg3d.models.conversion import read_own_weights
from mg3d.models.export import read_folder
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.language_encoders.checks import check_architecture
from mg3d.models.language_encoders.registry import PROGRAM_OF_BERT
from mg3d.models.network import MG3DNetwork
from mg3d.models.options import PUBLISHED_OBJECTIVES, NetworkOptions
from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder, encoder_from_metadata
from mg3d.models.weight_shapes import infer_network

logger = logging.getLogger(__name__)

SHARED_SPACE = "image_text_itc_head."
TEXT_ENCODER = "language_encoder."


class ImageEncoderOnly(nn.Module):
    """Holds an image encoder under the name it has in the whole network.

    Args:
        vision_encoder: the encoder.
    """

    def __init__(self, vision_encoder: VisionEncoder) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder


@dataclass(frozen=True)
class StoredModel:
    """Weights and their description, before any network is built.

    Attributes:
        tensors: name -> tensor in this project's names.
        metadata: keys of a checkpoint's ``mg3d_metadata``.
        preparation: how scans become volumes, for :func:`mg3d.inference.processor.make_processor`.
        tokenizer: candidates for the tokenizer: folders or hub ids, best first.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    preparation: dict[str, Any]
    tokenizer: tuple[str, ...] = ()


def read_stored(place: Place, allow_partial: bool = False) -> StoredModel:
    """Read an export folder or a weights file.

    Raises:
        CheckpointError: unreadable, damaged or incomplete.
    """
    if place.kind == "folder":
        return _read_export(place.path)
    own = read_own_weights(place.path, allow_partial=allow_partial)
    tokenizer = _tokenizer_places(own.metadata.get("text_encoder"), place.path)
    return StoredModel(own.tensors, own.metadata, {**published_geometry(), **own.metadata}, tokenizer)


def _read_export(folder: Path) -> StoredModel:
    exported = read_folder(folder)
    config = exported.config
    text = config.get("text_encoder") or {}
    metadata = {
        **config,
        "text_encoder": text.get("name"),
        "text_encoder_revision": text.get("revision"),
        "text_encoder_config": text.get("config") or {},
    }
    inside = (str(exported.tokenizer_dir),) if exported.tokenizer_dir else ()
    places = (*inside, *_tokenizer_places(text.get("name"), folder))
    return StoredModel(exported.state, metadata, exported.preprocessor, places)


def _tokenizer_places(name: Any, weights: Path) -> tuple[str, ...]:
    """Where a tokenizer named in a run's config may be: as written, or beside the run's own folders."""
    if not isinstance(name, str) or not name:
        return ()
    if Path(name).is_absolute():
        return (name,)
    beside = [parent / name for parent in weights.resolve().parents]
    return tuple(str(path) for path in (Path(name), *beside) if path.is_dir()) or (name,)


def build_network(stored: StoredModel) -> tuple[nn.Module, CoverageReport]:
    """Build the network that weights belong to and load them.

    Args:
        stored: the weights; without text encoder or fusion sizes only the image encoder is built.

    Returns:
        :class:`~mg3d.models.network.MG3DNetwork` or :class:`ImageEncoderOnly`, frozen and in evaluation mode, and what
        became of every tensor (also logged).

    Raises:
        CheckpointError: the description names no encoder, or does not fit the tensors.
    """
    if not stored.metadata.get("vision_encoder"):
        raise CheckpointError("the weights hold no image encoder that is known here", "name other weights")
    with torch.random.fork_rng(devices=[]):
        network = _whole_network(stored) or ImageEncoderOnly(encoder_from_metadata(stored.metadata["vision_encoder"]))
    assigned, report = match_tensors(stored.tensors, network.state_dict())
    report.patch_merging = str(stored.metadata.get("patch_merging") or "") if report.has_merging else ""
    network.load_state_dict(assigned, strict=False)
    logger.info("%s", report)
    return network.eval().requires_grad_(False), report


def random_network(architecture: str) -> ImageEncoderOnly:
    """Image encoder of an architecture, drawn from torch's global generator, frozen and in evaluation mode."""
    network = ImageEncoderOnly(create_vision_encoder(architecture))
    network.eval().requires_grad_(False)
    return network


def check_loaded(report: CoverageReport, name: str, allow_partial: bool) -> None:
    """Refuse weights that cover too little of the image encoder, see :func:`check_coverage`."""
    check_coverage(report, name, 0.0 if allow_partial else 0.95)


def has_trained_space(stored: StoredModel, report: CoverageReport) -> bool:
    """Whether image and text meet in a space that was trained, and all of it was loaded."""
    lacking = [
        name
        for name in (*report.missing, *(entry[0] for entry in report.reshaped))
        if name.startswith((SHARED_SPACE, TEXT_ENCODER)) and ".pooler." not in name
    ]
    present = any(name.startswith(SHARED_SPACE) for name in report.loaded)
    return bool(stored.metadata.get("has_shared_space", present)) and present and not lacking


def _whole_network(stored: StoredModel) -> MG3DNetwork | None:
    """The pre-training network without its optional queues; None where the weights hold no text encoder or fusion."""
    inferred = infer_network(stored.tensors)
    options = {**inferred.get("options", {}), **(stored.metadata.get("options") or {})}
    text = stored.metadata.get("text_encoder_config") or inferred.get("text_encoder_config")
    if not text or "hidden_size" not in options:
        return None
    try:
        chosen = _options(options, stored)

        def build() -> MG3DNetwork:
            encoder = encoder_from_metadata(stored.metadata["vision_encoder"])
            return MG3DNetwork(encoder, _text_encoder(text, stored.tokenizer), chosen)

        with torch.device("meta"):
            check_model_size(build(), "description of the network")
        return build()
    except MG3DError:
        raise
    except Exception as error:  # a bad value can fail in any way
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"the described network cannot be built ({first})", "export the model again") from error


def _options(found: Mapping[str, Any], stored: StoredModel) -> NetworkOptions:
    known = {entry.name for entry in dataclasses.fields(NetworkOptions)}
    kept: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key in known
    }
    # training only: queues of negatives, modules that are never run
    kept |= {"memory_queue": "none", "legacy_unused_modules": False, "image_only": False}
    objectives = kept.get("objectives") or PUBLISHED_OBJECTIVES
    if any(name.startswith(SHARED_SPACE) for name in stored.tensors):
        objectives = tuple(dict.fromkeys((*objectives, "itc")))
        first = stored.tensors.get(f"{SHARED_SPACE}image_proj.2.weight")
        kept.setdefault("itc_embed_dim", 256 if first is None else int(first.shape[0]))
    size = stored.metadata.get("input_size_dhw")
    if size and "volume_size" not in kept:
        kept["volume_size"] = tuple(int(edge) for edge in size)
    kept["objectives"] = tuple(objectives)
    return NetworkOptions(**kept)


def _text_encoder(config: Mapping[str, Any], tokenizer: Sequence[str]) -> BertTextEncoder:
    from transformers import AutoConfig, AutoModel

    settings = dict(config)
    if "hidden_act" not in settings:  # described by its shapes alone, which do not tell the number of heads
        settings |= _heads_beside(tokenizer, settings.get("hidden_size"))
    check_architecture(settings, "of the weights")
    kind = str(settings.pop("model_type", "bert"))
    architecture = AutoConfig.for_model("bert" if kind == PROGRAM_OF_BERT else kind, **settings)
    return BertTextEncoder(AutoModel.from_config(architecture), frozen=True, eval_mode=True)


def _heads_beside(tokenizer: Sequence[str], width: Any) -> dict[str, Any]:
    for place in tokenizer:
        if (Path(place) / "config.json").is_file():
            beside = read_json_object(Path(place) / "config.json")
            if beside.get("hidden_size") == width and "num_attention_heads" in beside:
                return {"num_attention_heads": beside["num_attention_heads"]}
    logger.warning("the weights do not record the text encoder's number of attention heads: 64 channels each assumed")
    return {}
