"""Names of the image encoders; an encoder's library is imported only when the encoder is built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from mg3d.errors import CheckpointError, ConfigError, EnvironmentProblem, MG3DError
from mg3d.models.vision_encoders.base import VisionEncoder

VISION_ENCODERS: dict[str, tuple[str, str]] = {
    "swin_b": ("mg3d.models.vision_encoders.swin", "build_swin_b"),
    "swin_l": ("mg3d.models.vision_encoders.swin", "build_swin_l"),
    "unet": ("mg3d.models.vision_encoders.unet", "build_unet"),
    "unet_pcrlv2": ("mg3d.models.vision_encoders.unet", "build_unet_pcrlv2"),
    "nnunet": ("mg3d.models.vision_encoders.nnunet", "build_nnunet"),
    "nnunet_resenc": ("mg3d.models.vision_encoders.nnunet", "build_nnunet_resenc"),
}
"""Registry name -> (module, builder)."""

_ENCODER_CLASS = {
    "mg3d.models.vision_encoders.swin": "SwinEncoder",
    "mg3d.models.vision_encoders.unet": "UNetEncoder",
    "mg3d.models.vision_encoders.nnunet": "NNUNetEncoder",
}
_INSTALL = {"dynamic_network_architectures": "pip install --no-deps -r requirements-nodeps.txt"}


class UnknownEncoderError(ConfigError, ValueError):
    """No encoder, or no option of an encoder, has the given name."""


def create_vision_encoder(
    name: str,
    *,
    patch_merging: str = "legacy",
    gradient_checkpointing: bool = False,
    compile_features: bool = False,
    **options: Any,
) -> VisionEncoder:
    """Build an image encoder by name.

    Args:
        name: a key of :data:`VISION_ENCODERS`.
        patch_merging: ``legacy`` (published weights) or ``fixed``; encoders without patch merging ignore it.
        gradient_checkpointing: recompute activations in the backward pass.
        compile_features: compute the feature maps through ``torch.compile``; on a CPU that needs a C++ compiler.
        **options: overrides of the encoder's own sizes, for example ``embed_dim=12``.

    Returns:
        The encoder, randomly initialised.

    Raises:
        UnknownEncoderError: unknown name or option (also a ``ValueError``); the message names the nearest one.
        ValueError: sizes that do not fit together.
        EnvironmentProblem: the encoder's library is not installed.
    """
    module = _import_family(name)
    accepted = _options_of(module)
    for option in options:
        if option not in accepted or option == "name":
            names = [each for each in accepted if each not in ("name", "patch_merging", "gradient_checkpointing")]
            names.append("compile_features")
            raise UnknownEncoderError(*_explain(f"option of the encoder {name!r}", option, names))
    encoder: VisionEncoder = getattr(module, VISION_ENCODERS[name][1])(
        patch_merging=patch_merging, gradient_checkpointing=gradient_checkpointing, **options
    )
    if compile_features:
        encoder.compile_features()
    return encoder


def encoder_from_metadata(metadata: Mapping[str, Any]) -> VisionEncoder:
    """Build the image encoder that a description stands for.

    Args:
        metadata: what an encoder's ``metadata()`` returned; keys that follow from the others are ignored.

    Returns:
        The encoder, randomly initialised.

    Raises:
        UnknownEncoderError: the described encoder does not exist here.
        CheckpointError: sizes out of bounds, that do not fit together, or of a network too large for any machine.
        EnvironmentProblem: the encoder's library is not installed.
    """
    import torch

    from mg3d.models.bounds import ENCODER, check_model_size, check_values

    name, place = str(metadata.get("name"))[:40], "description of the image encoder"
    accepted = _options_of(_import_family(name))
    check_values(metadata, ENCODER, place)
    options = {key: value for key, value in metadata.items() if key in accepted and key != "name"}
    try:
        if "proj_dims" in metadata:
            hidden, out = metadata["proj_dims"] or (0, 0)
            options |= {"proj_hidden_dim": hidden, "proj_out_dim": out}
        with torch.device("meta"):
            check_model_size(create_vision_encoder(name, **options), place)
        return create_vision_encoder(name, **options)
    except MG3DError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the described image encoder cannot be built ({first})", "export it again") from error


def _import_family(name: str) -> ModuleType:
    if name not in VISION_ENCODERS:
        raise UnknownEncoderError(*_explain("vision_encoder", name, list(VISION_ENCODERS)))
    try:
        return import_module(VISION_ENCODERS[name][0])
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "mg3d"):
            raise
        raise EnvironmentProblem(
            f"vision_encoder={name}: its package {package} is not installed",
            _INSTALL.get(package, "pip install -r requirements.txt"),
        ) from error


def _options_of(module: ModuleType) -> list[str]:
    encoder_class = getattr(module, _ENCODER_CLASS[module.__name__])
    return list(inspect.signature(encoder_class.__init__).parameters)[1:]


def _explain(what: str, given: str, valid: list[str]) -> tuple[str, str]:
    nearest = difflib.get_close_matches(given, valid, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {what}: {given!r}", f"{hint}valid: {', '.join(valid)}"
