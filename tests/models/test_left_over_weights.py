"""SwinUNETR v2 through every door, and the rule behind it: no tensor of an image encoder is left out in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TINY_SWIN, shaken, tiny_swin
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn

from mg3d import load_model
from mg3d.errors import CheckpointError
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.models.checkpoint import describe_weights, load_weights
from mg3d.models.conversion import read_own_weights
from mg3d.models.export import export_folder, read_folder
from mg3d.models.finetune.decoders import SwinSegmenter
from mg3d.models.finetune.layer_decay import encoder_stage
from mg3d.models.finetune.weights import build_encoder, load_encoder_weights
from mg3d.models.vision_encoders import create_vision_encoder
from tools.convert_meter_weights import main

State = dict[str, Tensor]


def unetr(use_v2: bool = True) -> SwinUNETR:
    torch.manual_seed(3)
    return shaken(SwinUNETR(in_channels=1, out_channels=3, feature_size=12, use_v2=use_v2)).eval()  # type: ignore


def same_maps(ours: nn.Module, theirs: SwinUNETR) -> None:
    volume = torch.rand(1, 1, 64, 32, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for found, wanted in zip(ours.eval()(volume), theirs.swinViT(volume), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


FORMS: dict[str, Callable[[State], object]] = {
    "monai": lambda state: {"state_dict": state},
    "voco_backbone": lambda state: {"state_dict": {f"module.backbone.{name}": v for name, v in state.items()}},
    "voco_student": lambda state: {f"module.student.{k}": v for k, v in state.items()} | {"teacher.x": torch.ones(1)},
    "voco_old_name": lambda state: {k.replace("swinViT", "swin_vit"): v for k, v in state.items()},
    "bare": lambda state: {k.removeprefix("swinViT."): v for k, v in state.items() if k.startswith("swinViT.")},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_swin_unetr_v2_give_its_features(tmp_path: Path, form: str) -> None:
    network = unetr()
    torch.save(FORMS[form](dict(network.state_dict())), tmp_path / "w.pt")
    own = read_own_weights(tmp_path / "w.pt", patch_merging="fixed")
    assert own.metadata["vision_encoder"] == tiny_swin(patch_merging="fixed", residual_blocks=True).metadata()
    assert own.report.encoder_loaded == own.report.encoder_total == 126 and not own.report.encoder_unused
    encoder = tiny_swin(1, "fixed", residual_blocks=True)
    report = load_weights(encoder, tmp_path / "w.pt", patch_merging="fixed")
    assert report.encoder_loaded == 126
    same_maps(encoder, network)


def test_the_encoder_and_monai_agree_to_the_last_digit_in_double_precision() -> None:
    network = unetr().double()
    encoder = create_vision_encoder("swin_b", patch_merging="fixed", residual_blocks=True, **TINY_SWIN).double().eval()
    encoder.load_state_dict(network.swinViT.state_dict(), strict=True)
    volume = torch.rand(1, 1, 64, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for found, wanted in zip(encoder(volume), network.swinViT(volume), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    encoder(volume)[-1].square().mean().backward()
    network.swinViT(volume)[-1].square().mean().backward()
    theirs = dict(network.swinViT.named_parameters())
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-12)


def test_v2_goes_to_a_folder_and_to_monai_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = unetr()
    torch.save(network.state_dict(), tmp_path / "voco.pt")
    assert main([str(tmp_path / "voco.pt"), str(tmp_path / "own"), "--to", "folder", "--patch-merging", "fixed"]) == 0
    described = read_folder(tmp_path / "own").config["vision_encoder"]
    assert described["residual_blocks"] is True
    assert "residual blocks (SwinUNETR v2)" in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    found = load_model(tmp_path / "own")
    assert found.report is not None and found.report.encoder_loaded == 126
    same_maps(found.vision_encoder, network)
    capsys.readouterr()
    assert main([str(tmp_path / "own"), str(tmp_path / "back.pt"), "--to", "monai_swin_unetr"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    again = SwinUNETR(out_channels=3, **summary["arguments"])
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
    assert not again.load_state_dict(back, strict=False).unexpected_keys
    same_maps(again.swinViT, network)


def test_an_export_folder_that_hides_its_residual_blocks_is_refused(tmp_path: Path) -> None:
    torch.save(unetr().state_dict(), tmp_path / "voco.pt")
    geometry = {"spacing_mm": None, "crop_fractions_dhw": [1, 1, 1], "window_hu": [-1150, 350], "axis_order": "DHW"}
    own = read_own_weights(tmp_path / "voco.pt", extra={**geometry, "input_size_dhw": [32, 32, 32]})
    config = export_folder(own, tmp_path / "own") / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    del content["vision_encoder"]["residual_blocks"]
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="residual_blocks=None"):
        load_model(tmp_path / "own")


def test_fine_tuning_takes_v2_whole(tmp_path: Path) -> None:
    network = unetr()
    torch.save(network.state_dict(), tmp_path / "voco.pt")
    cfg = resolve_finetune_config({"weights": str(tmp_path / "voco.pt"), "patch_merging": "fixed"})
    encoder = build_encoder(cfg)
    assert encoder.metadata()["residual_blocks"] is True
    module = nn.Module()
    module.network = SwinSegmenter(encoder, 3)  # type: ignore[arg-type]
    module.encoder = module.network.vision_encoder
    report = load_encoder_weights(module, cfg)
    assert report.encoder_loaded == report.encoder_total == 126 and len(report.missing) == 22
    same_maps(module.encoder, network)


def test_the_residual_block_of_a_stage_learns_at_the_rate_of_that_stage() -> None:
    assert [encoder_stage(f"layers{k}c.0.layer.conv1.conv.weight") for k in (1, 2, 4)] == [1, 2, 4]


def test_v1_and_v2_do_not_stand_for_each_other(tmp_path: Path) -> None:
    torch.save(unetr().state_dict(), tmp_path / "v2.pt")
    torch.save(unetr(use_v2=False).state_dict(), tmp_path / "v1.pt")
    with pytest.raises(CheckpointError, match=r"SwinUNETR v2 \(use_v2=True\)") as caught:
        load_weights(tiny_swin(1), tmp_path / "v2.pt")
    assert "residual_blocks=True" in caught.value.remedy
    deep = {**TINY_SWIN, "depths": (2, 2, 18, 2)}  # so many blocks that the four lacking ones are under 5 %
    torch.save(shaken(create_vision_encoder("swin_b", **deep)).state_dict(), tmp_path / "deep.pt")
    for name, sizes in (("v1.pt", TINY_SWIN), ("deep.pt", deep)):
        with pytest.raises(CheckpointError, match=r"no residual blocks.*SwinUNETR v2"):
            load_weights(create_vision_encoder("swin_b", residual_blocks=True, **sizes), tmp_path / name)


class Holder(nn.Module):
    """An encoder as the pre-training network holds it."""

    def __init__(self, name: str, **sizes: Any) -> None:
        super().__init__()
        self.vision_encoder = create_vision_encoder(name, **sizes)


NNUNET = {
    "features_per_stage": (4, 8),
    "strides": ((1, 1, 1), (2, 2, 2)),
    "kernel_sizes": ((3, 3, 3), (3, 3, 3)),
    "blocks_per_stage": (1, 1),
}
BARE: dict[str, tuple[str, dict[str, Any], str]] = {
    "swin": ("swin_b", TINY_SWIN, "layers3.0.blocks.2.norm1.weight"),
    "unet": ("unet", {"base_width": 4}, "down_tr64.ops.7.conv1.weight"),
    "nnunet": ("nnunet", NNUNET, "encoder.stages.9.conv.weight"),
}
PLACED: dict[str, Callable[[str], str]] = {
    "bare": lambda name: name,
    "mg3d": lambda name: f"vision_encoder.{name}",
    "module": lambda name: f"module.vision_encoder.{name}",
}
SWIN_ONLY: dict[str, Callable[[str], str]] = {
    "swin_unetr": lambda name: f"swinViT.{name}",
    "swin_simmim": lambda name: "encoder." + re.sub(r"^(layers\d+)\.0\.", r"\1.0.0.", name),
}
CASES = [(kind, form, place) for kind in BARE for form, place in PLACED.items()] + [
    ("swin", form, place) for form, place in SWIN_ONLY.items()
]


@pytest.mark.parametrize(("kind", "form", "place"), CASES, ids=[f"{kind}-{form}" for kind, form, _ in CASES])
def test_a_left_over_tensor_of_the_encoder_is_refused_for_every_family(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, form: str, place: Callable[[str], str]
) -> None:
    name, sizes, extra = BARE[kind]
    held = Holder(name, **sizes)
    state = {place(key): value for key, value in held.vision_encoder.state_dict().items()}
    rest = {"decoder.up.weight": torch.zeros(2), "rotation_head.bias": torch.zeros(2)}
    torch.save(state | rest, tmp_path / "whole.pt")
    assert load_weights(Holder(name, **sizes), tmp_path / "whole.pt").unexpected == list(rest)
    torch.save(state | rest | {place(extra): torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(CheckpointError, match="1 tensors of its image encoder"):
        load_weights(Holder(name, **sizes), tmp_path / "more.pt")
    report = load_weights(Holder(name, **sizes), tmp_path / "more.pt", allow_partial=True)
    assert len(report.encoder_unused) == 1 and "are not used" in caplog.text


def test_a_left_over_tensor_is_refused_by_every_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = tiny_swin()
    extra = {"vision_encoder.norm_after.weight": torch.ones(3)}
    state = {f"vision_encoder.{name}": value for name, value in encoder.state_dict().items()} | extra
    holder = nn.Module()
    holder.vision_encoder = encoder
    geometry = {"spacing_mm": None, "crop_fractions_dhw": [1, 1, 1], "window_hu": [-1150, 350], "axis_order": "DHW"}
    for file, metadata in (("said.pt", describe_weights(holder, input_size_dhw=[32] * 3, **geometry)), ("bare.pt", {})):
        torch.save({"state_dict": state, "mg3d_metadata": metadata}, tmp_path / file)
        cfg = resolve_finetune_config({"weights": str(tmp_path / file)})
        module = nn.Module()
        module.encoder = build_encoder(cfg)
        doors: dict[str, Callable[[], object]] = {
            "load_weights": lambda file=file: load_weights(tiny_swin(1), tmp_path / file),
            "convert": lambda file=file: read_own_weights(tmp_path / file),
            "load_model": lambda file=file: load_model(tmp_path / file),
            "fine-tuning": lambda module=module, cfg=cfg: load_encoder_weights(module, cfg),
        }
        for door, enter in doors.items():
            with pytest.raises(CheckpointError, match=r"1 tensors of its image encoder.*norm_after"):
                enter()
            assert door
        assert main([str(tmp_path / file), str(tmp_path / "out.pt"), "--to", "mg3d"]) == 2
        assert "norm_after" in capsys.readouterr().err


def test_an_encoder_tensor_of_another_shape_is_no_small_loss(tmp_path: Path) -> None:
    """117 of 118 entries fit, and the first layer, made for four sequences, would stay random."""
    state = {f"swinViT.{name}": value for name, value in tiny_swin().state_dict().items()}
    state["swinViT.patch_embed.proj.weight"] = torch.zeros(12, 4, 2, 2, 2)
    torch.save(state, tmp_path / "brats.pt")
    with pytest.raises(CheckpointError, match=r"1 tensors of its image encoder.*patch_embed"):
        load_weights(tiny_swin(1), tmp_path / "brats.pt")


def test_a_projection_head_belongs_to_the_tokens_and_not_to_swin_unetr(tmp_path: Path) -> None:
    sizes = {**TINY_SWIN, "proj_hidden_dim": 24, "proj_out_dim": 48}
    torch.save(Holder("swin_l", **sizes).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="proj_head"):
        load_weights(Holder("swin_b", **TINY_SWIN), tmp_path / "w.pt")
    report = load_weights(
        SwinUNETR(in_channels=1, out_channels=2, feature_size=12), tmp_path / "w.pt", patch_merging="fixed"
    )
    assert report.encoder_loaded == 118 and len(report.unexpected) == 6


def test_an_unknown_architecture_is_described_by_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"convInit.conv{k}.weight": torch.zeros(2) for k in range(3)} | {"down_layers.0.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "segresnet.pt")
    doors: tuple[Callable[[], object], ...] = (
        lambda: load_weights(tiny_swin(), tmp_path / "segresnet.pt"),
        lambda: load_weights(tiny_swin(), tmp_path / "segresnet.pt", allow_partial=True),
        lambda: load_model(tmp_path / "segresnet.pt"),
        lambda: build_encoder(resolve_finetune_config({"weights": str(tmp_path / "segresnet.pt")})),
    )
    for enter in doors:
        with pytest.raises(
            CheckpointError, match=r"no supported family.* 4 tensors.*convInit \(3\), down_layers \(1\)"
        ):
            enter()
    for words in ([], ["--allow-partial"]):
        assert main([str(tmp_path / "segresnet.pt"), str(tmp_path / "out"), "--to", "folder", *words]) == 2
        told = capsys.readouterr().err
        assert "convInit (3)" in told and "0 of 0" not in told and len(told.splitlines()) <= 5


def test_nnunet_weights_without_plans_say_that_sizes_are_not_known(tmp_path: Path) -> None:
    torch.save({"network_weights": {"encoder.stages.0.conv.weight": torch.zeros(2)}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"sizes of its image encoder are not known \(layout: nnunet\)"):
        read_own_weights(tmp_path / "w.pth")
