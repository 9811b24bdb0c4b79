"""Segmentation networks: MONAI's names and numbers, every decoder trains, losses by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import manifest_state
from monai.networks.nets.swin_unetr import SwinUNETR
from segmentation_cases import task
from torch import nn

from mg3d.errors import ConfigError
from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config
from mg3d.models.finetune.decoders import build_segmenter
from mg3d.models.finetune.segmentation import build_segmentation_module
from mg3d.models.finetune.segmentation_loss import SegmentationLoss
from mg3d.models.finetune.weights import load_encoder_weights
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.models.vision_encoders.monai_swin import LegacyPatchMerging
from mg3d.models.weights_file import read_weights_file

SMALL: dict[str, dict[str, Any]] = {
    "swin_b": {"embed_dim": 12},
    "unet": {"base_width": 4},
    "nnunet": {"features_per_stage": [4, 8, 8], "strides": [1, 2, 2]},
    "nnunet_resenc": {"features_per_stage": [4, 8, 8], "strides": [1, 2, 2]},
}


TASK = task(roi=(64, 64, 32))


def config(**keys: Any) -> FinetuneConfig:
    return resolve_finetune_config({"num_workers": 0, "num_gpus": 0, "feature_size": 12, **keys})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 32, 32), (40, 20, 33)])
def test_every_encoder_gets_the_decoder_of_its_family(name: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = build_segmenter(create_vision_encoder(name, **SMALL[name]), 3)
    logits = network(torch.rand(2, 1, *size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    lacking = [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None]
    assert lacking == []  # or data-parallel training would wait for them
    with pytest.raises(ConfigError, match="does not fit"):
        build_segmenter(network.vision_encoder, 3, "unet" if name != "unet" else "nnunet")


@pytest.mark.parametrize("order", ["fixed", "legacy"])
def test_our_encoder_in_swin_unetr_gives_monais_logits(order: str) -> None:
    torch.manual_seed(0)
    ours = build_segmenter(create_vision_encoder("swin_b", patch_merging=order, embed_dim=12), 4).eval()
    merging: Any = LegacyPatchMerging if order == "legacy" else "merging"
    theirs = SwinUNETR(in_channels=1, out_channels=4, feature_size=12, downsample=merging).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    volume = torch.rand(1, 1, 64, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(volume), theirs(volume), rtol=1e-3, atol=2e-4)
    other = build_segmenter(create_vision_encoder("swin_b", patch_merging=order, embed_dim=12), 4)
    other.load_state_dict(theirs.state_dict())  # strictly, MONAI's index buffers included


def test_a_released_swin_b_loads_126_of_159_entries(reference_dir: Path, tmp_path: Path) -> None:
    whole = manifest_state(reference_dir)
    state = {key: value for key, value in whole.items() if key.startswith("vision_encoder.")}
    extra = {f"unrelated.{k}.weight": torch.zeros(2) for k in range(20)}
    for name, content in (
        ("flat", state | extra),
        ("wrapped", {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
    ):
        torch.save(content, tmp_path / f"{name}.ckpt")
        cfg = config(weights=str(tmp_path / f"{name}.ckpt"), feature_size=0, patch_merging="auto")
        module = build_segmentation_module(cfg, TASK, 10)
        before = {key: value.clone() for key, value in module.network.state_dict().items()}
        report = load_encoder_weights(module, cfg)
        changed = [key for key, value in module.network.state_dict().items() if not torch.equal(value, before[key])]
        assert (len(report.loaded), len(report.missing), len(before)) == (126, 33, 159)
        assert not report.reshaped and report.patch_merging == "legacy"
        assert changed and all(key.startswith("swinViT.") for key in changed)
        key = "layers1.0.blocks.0.attn.qkv.weight"
        assert torch.equal(module.encoder.state_dict()[key], state[f"vision_encoder.{key}"])


def test_segmentation_blocks_of_other_files_are_taken_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = SwinUNETR(in_channels=1, out_channels=14, feature_size=12)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "unetr.pt")
    cfg = config(weights=str(tmp_path / "unetr.pt"), patch_merging="fixed")
    module = build_segmentation_module(cfg, TASK, 10)
    report = load_encoder_weights(module, cfg)
    assert len(report.loaded) == 126 + 11
    assert torch.equal(
        module.network.state_dict()["encoder10.layer.conv1.conv.weight"], theirs.encoder10.layer.conv1.conv.weight
    )


@pytest.mark.parametrize("encoder", ["swin_b", "unet"])
def test_a_fine_tuned_checkpoint_gives_its_encoder_to_another_run(tmp_path: Path, encoder: str) -> None:
    first = build_segmentation_module(config(encoder=encoder), TASK, 10)
    checkpoint: dict[str, Any] = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    cfg = config(encoder=encoder, weights=str(tmp_path / "best.ckpt"), feature_size=0)
    torch.manual_seed(5)
    second = build_segmentation_module(cfg, replace(TASK, classes=("one",), label_map={1: 1, 2: 1}), 10)
    report = load_encoder_weights(second, cfg)
    assert report.encoder_loaded == report.encoder_total > 0
    for key, value in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[key], value), key
    if encoder == "swin_b":  # and to MONAI, whole
        state = read_weights_file(tmp_path / "best.ckpt").tensors
        SwinUNETR(in_channels=1, out_channels=3, feature_size=12).load_state_dict(state)


def test_a_window_of_one_position_is_refused_with_its_mend() -> None:
    cfg = config(patch_merging="fixed")
    with pytest.raises(ConfigError, match=r"roi=\[32, 32, 32\] leaves one position.*\n.*64, 32, 32"):
        build_segmentation_module(cfg, task(roi=(32, 32, 32)), 10)
    build_segmentation_module(cfg, task(roi=(64, 32, 32)), 10)
    build_segmentation_module(config(encoder="unet", feature_size=4), task(roi=(32, 32, 32)), 10)
    with pytest.raises(ConfigError, match="answers one question"):
        build_segmentation_module(config(mode="knn_probe"), TASK, 10)


def test_a_clean_unet_predicts_each_window_alone_and_the_published_one_does_not() -> None:
    windows = torch.rand(2, 1, 32, 32, 32) * torch.tensor([1.0, 0.2]).reshape(2, 1, 1, 1, 1)
    for protocol, alone in (("clean", True), ("reference", False)):
        cfg = config(encoder="unet", feature_size=4, protocol=protocol)
        network = build_segmentation_module(cfg, TASK, 10).eval()
        with torch.no_grad():
            together, single = network(windows)[:1], network(windows[:1])
        assert torch.allclose(together, single, atol=1e-5) is alone


def test_a_linear_probe_trains_the_decoder_alone() -> None:
    module = build_segmentation_module(config(mode="linear_probe", patch_merging="fixed"), TASK, 10)
    assert not any(parameter.requires_grad for parameter in module.encoder.parameters())
    assert any(parameter.requires_grad for parameter in module.network.parameters())
    rates = module.configure_optimizers()["optimizer"].param_groups
    assert sum(len(group["params"]) for group in rates) == 33


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["dice_ce", "dice_squared_ce", "dice"])
def test_losses_by_hand(name: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 3, 2))
    label = rng.integers(0, 3, size=(2, 1, 4, 3, 2))
    label[1] = np.where(label[1] == 2, 0, label[1])  # a class that one crop does not hold
    truth = np.moveaxis(np.eye(3)[label[:, 0]], -1, 1)
    found = softmax(logits)
    above = (truth * found).sum(axis=(2, 3, 4))
    squared = name == "dice_squared_ce"
    below = (truth**2 if squared else truth).sum(axis=(2, 3, 4)) + (found**2 if squared else found).sum(axis=(2, 3, 4))
    top, bottom = (0.0, 1e-6) if squared else (1e-5, 1e-5)
    dice = 1 - (2 * above + top) / (below + bottom)
    wanted = dice[:, 1:].mean() if name == "dice_ce" else dice.mean()
    if name != "dice":
        wanted += -np.log((truth * found).sum(axis=1)).mean()
    loss = SegmentationLoss(name)(torch.from_numpy(logits).float(), torch.from_numpy(label).to(torch.uint8))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_an_unknown_loss_and_a_task_without_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of dice_ce"):
        SegmentationLoss("focal")
    with pytest.raises(ConfigError, match="names no class"):
        build_segmentation_module(config(), task(classes=()), 10)
    assert isinstance(SegmentationLoss("dice"), nn.Module)
