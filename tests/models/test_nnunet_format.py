"""Checkpoints in nnU-Net's format, taken by nnU-Net's own loader, and nnU-Net's checkpoints taken here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from mg3d.errors import CheckpointError
from mg3d.models.checkpoint import load_weights
from mg3d.models.conversion import read_own_weights
from mg3d.models.nnunet_format import build_network, plans_architecture, stated_architecture, to_nnunet
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.models.weights_file import NNUNET_KEY, read_weights_file
from tools.convert_meter_weights import main

SIZES = {
    "features_per_stage": (4, 8, 16),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "blocks_per_stage": (2, 1, 3),
}
KINDS = ("nnunet", "nnunet_resenc")


def encoder(name: str, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return create_vision_encoder(name, **SIZES)


def theirs(path: Path, classes: int = 7) -> nn.Module:
    """The network nnU-Net builds from the plans in a checkpoint."""
    plans = stated_architecture(read_weights_file(path).metadata[NNUNET_KEY])
    arguments = (plans["network_class_name"], plans["arch_kwargs"], plans["_kw_requires_import"])
    return get_network_from_plans(*arguments, 1, classes, deep_supervision=True)


@pytest.mark.parametrize("name", KINDS)
def test_nnunet_itself_takes_the_weights_and_computes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = encoder(name)
    torch.save(
        {
            "state_dict": {f"vision_encoder.{key}": value for key, value in source.state_dict().items()},
            "mg3d_metadata": {"vision_encoder": source.metadata()},
        },
        tmp_path / "own.ckpt",
    )
    out = tmp_path / "pretrained.pth"
    assert main([str(tmp_path / "own.ckpt"), str(out), "--to", "nnunet", "--classes", "3"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["encoder_loaded"] == summary["encoder_total"] == len(source.state_dict())
    content = torch.load(out, weights_only=True)
    del content["mg3d_metadata"]
    torch.save(content, tmp_path / "plain.pth")
    network = theirs(tmp_path / "plain.pth")
    load_pretrained_weights(network, str(out))
    assert summary["entries"] == len(network.state_dict())
    assert summary["architecture"] == plans_architecture(source.metadata())
    volume = torch.rand(2, 1, 16, 32, 32)
    with torch.no_grad():
        for one, other in zip(source(volume), network.encoder(volume), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_of_nnunet_comes_back_with_its_architecture(tmp_path: Path, name: str) -> None:
    source = encoder(name)
    content = to_nnunet(source.state_dict(), {"vision_encoder": source.metadata()})
    logging = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "epoch_end_timestamps": [1.0]}
    path = tmp_path / "checkpoint_final.pth"
    torch.save(content | {"logging": logging, "_best_ema": np.float64(0.5)}, path)
    own = read_own_weights(path)
    assert own.metadata["vision_encoder"] == source.metadata() and own.report.family == "nnunet"
    wanted = {f"vision_encoder.{key}": value for key, value in source.state_dict().items()}
    assert own.tensors.keys() == wanted.keys() and all(torch.equal(own.tensors[key], wanted[key]) for key in wanted)
    target = encoder(name, seed=6)
    report = load_weights(target, path)
    assert len(report.loaded) == len(wanted) and report.encoder_fraction == 1
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
    network = build_network(plans_architecture(source.metadata()), 2)
    report = load_weights(network, path)
    assert not report.missing and len(report.loaded) == len(network.state_dict()) and not report.dropped


def test_objects_beside_the_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({"network_weights": {}, "a": np.array([Path], dtype=object)}, tmp_path / "objects.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_weights_file(tmp_path / "objects.pth")


def test_other_encoders_networks_and_plans_are_refused(tmp_path: Path) -> None:
    unet = create_vision_encoder("unet", base_width=2)
    with pytest.raises(CheckpointError, match="encoder unet is none of nnU-Net's"):
        to_nnunet(unet.state_dict(), {"vision_encoder": unet.metadata()})
    source = encoder("nnunet")
    described = plans_architecture(source.metadata())
    with pytest.raises(CheckpointError, match=r"os\.system is no layer"):
        build_network(described | {"arch_kwargs": described["arch_kwargs"] | {"conv_op": "os.system"}}, 2)
    with pytest.raises(CheckpointError, match=r"my\.UNet is none that fits"):
        build_network(described | {"network_class_name": "my.UNet"}, 2)
    state = dict(source.state_dict())
    state.popitem()
    with pytest.raises(CheckpointError, match="1 entries missing, 0 unknown"):
        to_nnunet(state, {"vision_encoder": source.metadata()})
    content = to_nnunet(source.state_dict(), {"vision_encoder": source.metadata()})
    del content["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="plans in the file cannot be used"):
        read_own_weights(tmp_path / "w.pth")
