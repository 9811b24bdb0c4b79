"""nnU-Net v2's checkpoint format: ``network_weights`` for ``nnUNetv2_train -pretrained_weights``, and its architecture.

nnU-Net asks for every entry of its network but the segmentation layers, so the decoder is written too, freshly drawn.
Its networks come from the package ``dynamic-network-architectures``, as do the encoders of this project that fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mg3d.errors import CheckpointError, EnvironmentProblem

PLAIN_CLASS = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL_CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
TO_IMPORT = ("conv_op", "norm_op", "dropout_op", "nonlin")
CONFIGURATION = "3d_fullres"


def library_encoder(module: nn.Module) -> nn.Module:
    """The nnU-Net encoder inside a module.

    Args:
        module: an image encoder of this project.

    Raises:
        CheckpointError: it holds none.
    """
    for part in module.modules():
        if type(part).__name__ in ("PlainConvEncoder", "ResidualEncoder"):
            return part
    name = getattr(module, "name", type(module).__name__)
    raise CheckpointError(f"the encoder {name} is none of nnU-Net's", "only plain and residual nnU-Net encoders fit")


def architecture(encoder: nn.Module) -> dict[str, Any]:
    """The ``architecture`` entry of nnU-Net plans for a network around an encoder, in plain types.

    Args:
        encoder: result of :func:`library_encoder`.
    """
    read: Any = encoder
    stages, residual = len(read.stages), type(encoder).__name__ == "ResidualEncoder"
    counts = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    arguments = {
        "n_stages": stages,
        "features_per_stage": [int(width) for width in read.output_channels],
        "conv_op": _dotted(read.conv_op),
        "kernel_sizes": [_three(size) for size in read.kernel_sizes],
        "strides": [_three(stride) for stride in read.strides],
        counts: [_depth(stage) for stage in read.stages],
        "n_conv_per_stage_decoder": [1 if residual else 2] * (stages - 1),
        "conv_bias": bool(read.conv_bias),
        "norm_op": _dotted(read.norm_op),
        "norm_op_kwargs": dict(read.norm_op_kwargs or {}),
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": _dotted(read.nonlin),
        "nonlin_kwargs": dict(read.nonlin_kwargs or {}),
    }
    class_name = RESIDUAL_CLASS if residual else PLAIN_CLASS
    return {"network_class_name": class_name, "arch_kwargs": arguments, "_kw_requires_import": list(TO_IMPORT)}


def _dotted(kind: type | None) -> str | None:
    return None if kind is None else f"{kind.__module__}.{kind.__qualname__}"


def _three(value: Any) -> list[int]:
    return [int(value)] * 3 if isinstance(value, int) else [int(edge) for edge in value]


def _depth(stage: Any) -> int:
    """Convolutions (plain) or blocks (residual) of one stage."""
    inner: Any = stage[-1] if isinstance(stage, nn.Sequential) else stage
    return len(inner.blocks if hasattr(inner, "blocks") else inner.convs)


def build_network(described: Mapping[str, Any], classes: int, deep_supervision: bool = True) -> nn.Module:
    """nnU-Net's network class from the ``architecture`` entry of its plans, initialised as nnU-Net does.

    Args:
        described: as :func:`architecture` returns it.
        classes: channels of the segmentation, background included.
        deep_supervision: segmentation layers at every resolution.

    Raises:
        EnvironmentProblem: ``dynamic-network-architectures`` is not installed.
        CheckpointError: another network class than nnU-Net's two.
    """
    try:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    except ImportError as error:
        raise EnvironmentProblem(
            "dynamic-network-architectures is not installed", "pip install dynamic-network-architectures"
        ) from error
    kinds = {PLAIN_CLASS: PlainConvUNet, RESIDUAL_CLASS: ResidualEncoderUNet}
    if described["network_class_name"] not in kinds:
        raise CheckpointError(f"{described['network_class_name']} is none of nnU-Net's", f"known: {', '.join(kinds)}")
    options = {key: _imported(value) if key in TO_IMPORT else value for key, value in described["arch_kwargs"].items()}
    kind = kinds[described["network_class_name"]]
    network: nn.Module = kind(input_channels=1, num_classes=classes, deep_supervision=deep_supervision, **options)
    network.apply(kind.initialize)
    return network


def _imported(name: str | None) -> type | None:
    """Class of torch by its dotted name; nothing else may be named."""
    if name is None:
        return None
    kind = getattr(nn, name.rpartition(".")[2], None)
    if not name.startswith("torch.nn.") or not isinstance(kind, type):
        raise CheckpointError(f"{name} is no layer of torch.nn", "use the plans that nnU-Net wrote")
    return kind


def to_nnunet(encoder: nn.Module, metadata: Mapping[str, Any], classes: int = 2) -> dict[str, Any]:
    """Content of a checkpoint that nnU-Net takes as pre-trained weights.

    Args:
        encoder: a trained image encoder of this project, of nnU-Net's kind.
        metadata: description of the weights.
        classes: channels of the segmentation; nnU-Net does not transfer that layer.

    Returns:
        ``network_weights`` (encoder, its second copy inside the decoder, fresh decoder), ``init_args`` with the
        architecture as nnU-Net plans state it, and the description.

    Raises:
        CheckpointError: the encoder is none of nnU-Net's.
    """
    inner = library_encoder(encoder)
    described = architecture(inner)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(described, classes)
    network.get_submodule("encoder").load_state_dict(inner.state_dict())
    configuration = {
        "architecture": described,
        "patch_size": metadata.get("input_size_dhw"),
        "spacing": metadata.get("spacing_mm"),
    }
    return {
        "network_weights": {name: value.detach().clone() for name, value in network.state_dict().items()},
        "init_args": {"plans": {"configurations": {CONFIGURATION: configuration}}, "configuration": CONFIGURATION},
        "trainer_name": "nnUNetTrainer",
        "current_epoch": 0,
    }


def stated_architecture(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The ``architecture`` entry of the plans in an nnU-Net checkpoint; empty if there is none.

    Args:
        arguments: ``init_args`` of the checkpoint.
    """
    plans, name = arguments.get("plans") or {}, arguments.get("configuration", CONFIGURATION)
    found = (plans.get("configurations") or {}).get(name, {})
    return dict(found.get("architecture") or {})
