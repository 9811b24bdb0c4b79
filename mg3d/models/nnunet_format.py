"""nnU-Net v2's checkpoint format: ``network_weights`` for ``nnUNetv2_train -pretrained_weights``, and its architecture.

nnU-Net asks for every entry of its network but the segmentation layers, so the decoder is written too, freshly drawn.
The way back reads the sizes from the plans that nnU-Net stores in its checkpoints (``init_args``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.errors import CheckpointError, EnvironmentProblem
from mg3d.models.bounds import Bound, check_values

PLAIN_CLASS = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL_CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
ENCODER_OF_CLASS = {PLAIN_CLASS: "nnunet", RESIDUAL_CLASS: "nnunet_resenc"}
TO_IMPORT = ("conv_op", "norm_op", "dropout_op", "nonlin")
CONFIGURATION = "3d_fullres"

_LAYERS: dict[str, Any] = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""What nnU-Net's planner writes for every 3-D network."""


def plans_architecture(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The segmentation network that nnU-Net builds around an encoder, as its plans spell it.

    Args:
        metadata: description of an nnU-Net encoder of this project.

    Returns:
        The entry ``architecture`` of a configuration in ``plans.json``, with nnU-Net's usual decoder.

    Raises:
        CheckpointError: the encoder is none of nnU-Net's.
    """
    name = metadata.get("name")
    class_name = next((kind for kind, encoder in ENCODER_OF_CLASS.items() if encoder == name), None)
    if class_name is None:
        raise CheckpointError(f"the encoder {name} is none of nnU-Net's", "only nnunet and nnunet_resenc fit nnU-Net")
    residual, count = class_name == RESIDUAL_CLASS, len(metadata["features_per_stage"])
    sizes = {
        "n_stages": count,
        **{key: metadata[key] for key in ("features_per_stage", "kernel_sizes", "strides")},
        "n_blocks_per_stage" if residual else "n_conv_per_stage": metadata["blocks_per_stage"],
        "n_conv_per_stage_decoder": [1 if residual else 2] * (count - 1),
    }
    return {
        "network_class_name": class_name,
        "arch_kwargs": sizes | _LAYERS,
        "_kw_requires_import": list(TO_IMPORT),
    }


def build_network(described: Mapping[str, Any], classes: int, deep_supervision: bool = True) -> nn.Module:
    """nnU-Net's network class from the ``architecture`` entry of its plans, initialised as nnU-Net does.

    Args:
        described: see :func:`plans_architecture`.
        classes: channels of the segmentation, background included.
        deep_supervision: segmentation layers at every resolution.

    Raises:
        EnvironmentProblem: ``dynamic-network-architectures`` is not installed.
        CheckpointError: another network class than nnU-Net's two, or layers that are not torch's.
    """
    try:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    except ImportError as error:
        raise EnvironmentProblem(
            "dynamic-network-architectures is not installed", "pip install --no-deps -r requirements-nodeps.txt"
        ) from error
    _check_class(described)
    kind = PlainConvUNet if described["network_class_name"] == PLAIN_CLASS else ResidualEncoderUNet
    options = {key: _imported(value) if key in TO_IMPORT else value for key, value in described["arch_kwargs"].items()}
    network: nn.Module = kind(input_channels=1, num_classes=classes, deep_supervision=deep_supervision, **options)
    network.apply(kind.initialize)
    return network


def _check_class(described: Mapping[str, Any]) -> None:
    if str(described.get("network_class_name")) not in ENCODER_OF_CLASS:
        raise CheckpointError(
            f"the network {described.get('network_class_name')} is none that fits",
            f"known: {', '.join(ENCODER_OF_CLASS)}",
        )


def _imported(name: str | None) -> type | None:
    """Class of torch by its dotted name; nothing else may be named."""
    if name is None:
        return None
    kind = getattr(nn, name.rpartition(".")[2], None)
    if not name.startswith("torch.nn.") or not isinstance(kind, type):
        raise CheckpointError(f"{name} is no layer of torch.nn", "use the plans that nnU-Net wrote")
    return kind


def to_nnunet(encoder: Mapping[str, Tensor], metadata: Mapping[str, Any], classes: int = 2) -> dict[str, Any]:
    """Content of a checkpoint that nnU-Net takes as pre-trained weights.

    Args:
        encoder: state dict of an nnU-Net encoder of this project (``encoder.stages...``).
        metadata: description of the weights, with the encoder's under ``vision_encoder``.
        classes: channels of the segmentation; nnU-Net does not transfer that layer.

    Returns:
        ``network_weights`` (encoder, its second copy inside the decoder, fresh decoder) and ``init_args`` with the
        architecture as nnU-Net plans state it.

    Raises:
        CheckpointError: the encoder is none of nnU-Net's, or entries are missing.
    """
    architecture = plans_architecture(metadata["vision_encoder"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(architecture, classes)
    # nnU-Net's blocks register every layer a second time as ``all_modules``; the decoder holds the encoder once more
    lacking, unknown = network.load_state_dict(dict(encoder), strict=False)
    lacking = [name for name in lacking if name.startswith("encoder.") and ".all_modules." not in name]
    if lacking or unknown:
        raise CheckpointError(
            f"{len(lacking)} entries missing, {len(unknown)} unknown, first {(lacking + unknown)[0]}",
            "convert a whole encoder",
        )
    plans = {
        "architecture": architecture,
        "patch_size": metadata.get("input_size_dhw"),
        "spacing": metadata.get("spacing_mm"),
    }
    return {
        "network_weights": {name: value.detach().clone() for name, value in network.state_dict().items()},
        "init_args": {"plans": {"configurations": {CONFIGURATION: plans}}, "configuration": CONFIGURATION},
        "trainer_name": "nnUNetTrainer",
        "current_epoch": 0,
    }


def stated_architecture(arguments: Any) -> dict[str, Any]:
    """The ``architecture`` entry of the plans in an nnU-Net checkpoint; empty if there is none.

    A configuration that inherits from another takes that one's architecture.

    Args:
        arguments: ``init_args`` of the checkpoint.
    """
    name = _mapping(arguments).get("configuration", CONFIGURATION)
    configurations = _mapping(_mapping(_mapping(arguments).get("plans")).get("configurations"))
    for _ in range(len(configurations)):
        found = _mapping(configurations.get(str(name)))
        if "architecture" in found:
            return dict(_mapping(found["architecture"]))
        name = found.get("inherits_from")
    return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def describe_encoder(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Description of the encoder of an nnU-Net, as this project's encoder gives it in ``metadata()``.

    Args:
        architecture: see :func:`stated_architecture`.

    Raises:
        CheckpointError: another network class, or sizes that are missing.
    """
    _check_class(architecture)
    sizes, name = _mapping(architecture.get("arch_kwargs")), ENCODER_OF_CLASS[architecture["network_class_name"]]
    check_values({"n_stages": sizes.get("n_stages")}, {"n_stages": Bound(1, 16)}, "plans of nnU-Net")
    try:
        blocks = sizes["n_blocks_per_stage" if name == "nnunet_resenc" else "n_conv_per_stage"]
        count = int(sizes["n_stages"])
        return {
            "name": name,
            "features_per_stage": _each(sizes["features_per_stage"], count),
            "strides": [_three(step) for step in _each(sizes["strides"], count)],
            "kernel_sizes": [_three(edges) for edges in _each(sizes["kernel_sizes"], count)],
            "blocks_per_stage": _each(blocks, count),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the plans in the file cannot be used ({error})", "use the file that nnU-Net wrote"
        ) from error


def _each(value: Any, count: int) -> list[Any]:
    return [value] * count if isinstance(value, int) else list(value)


def _three(value: Any) -> list[int]:
    return [int(value)] * 3 if isinstance(value, int) else [int(edge) for edge in value]
