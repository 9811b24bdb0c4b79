"""Checkpoints in nnU-Net's format, taken by nnU-Net's own loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from mg3d.errors import CheckpointError
from mg3d.models.nnunet_format import architecture, build_network, library_encoder, stated_architecture, to_nnunet
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.models.weights_file import NNUNET_KEY, read_weights_file

COMMON = {
    "conv_op": nn.Conv3d,
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
    "return_skips": True,
}


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(5)
    if kind == "plain":
        return PlainConvEncoder(1, 3, (4, 8, 16), n_conv_per_stage=(2, 1, 3), **COMMON)
    return ResidualEncoder(1, 3, (4, 8, 16), n_blocks_per_stage=(1, 2, 3), **COMMON)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_nnunet_itself_takes_the_weights_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    source = encoder(kind)
    path = tmp_path / "pretrained.pth"
    torch.save(to_nnunet(nn.ModuleDict({"inner": source}), {"input_size_dhw": [16, 32, 32]}), path)
    file = read_weights_file(path)
    plans = stated_architecture(file.metadata[NNUNET_KEY])
    network = get_network_from_plans(
        plans["network_class_name"], plans["arch_kwargs"], plans["_kw_requires_import"], 1, 7, deep_supervision=True
    )
    load_pretrained_weights(network, str(path))
    assert network.encoder.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(value, network.encoder.state_dict()[name]) for name, value in source.state_dict().items())
    volume = torch.rand(2, 1, 16, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(source(volume), network.encoder(volume), strict=True):
            assert torch.equal(ours, theirs)
    assert architecture(network.encoder) == plans


def test_a_checkpoint_with_numpy_numbers_is_read_and_objects_are_not(tmp_path: Path) -> None:
    content = to_nnunet(encoder("plain"), {})
    logging = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "epoch_end_timestamps": [1.0]}
    torch.save(content | {"logging": logging, "_best_ema": np.float64(0.5)}, tmp_path / "checkpoint_final.pth")
    assert len(read_weights_file(tmp_path / "checkpoint_final.pth").tensors) == len(content["network_weights"])
    torch.save({"network_weights": {}, "a": np.array([Path], dtype=object)}, tmp_path / "objects.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_weights_file(tmp_path / "objects.pth")


def test_other_encoders_and_networks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="encoder unet is none of nnU-Net's"):
        library_encoder(create_vision_encoder("unet", base_width=2))
    described = architecture(encoder("plain"))
    with pytest.raises(CheckpointError, match=r"os\.system is no layer"):
        build_network(described | {"arch_kwargs": described["arch_kwargs"] | {"conv_op": "os.system"}}, 2)
    with pytest.raises(CheckpointError, match="none of nnU-Net's"):
        build_network(described | {"network_class_name": "my.UNet"}, 2)
