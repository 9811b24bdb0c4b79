"""Files of other programs: recognised by their names, used as far as they fit, the rest explained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import shaken, tiny_swin
from monai.networks.nets.swin_unetr import SwinUNETR
from tiny_network import tiny_network
from torch import Tensor

from mg3d.errors import CheckpointError
from mg3d.models.checkpoint import load_weights
from mg3d.models.conversion import read_own_weights, to_swin_unetr
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.models.vision_encoders.monai_swin import build_swin_unetr
from mg3d.models.weight_maps import (
    OF_OTHER_ENCODER,
    OF_TWO_DIMENSIONAL,
    OTHER_ENCODER,
    OTHER_TASK,
    TWO_DIMENSIONAL,
    recognise,
)

State = dict[str, Tensor]


@functools.cache
def unetr() -> State:
    torch.manual_seed(3)
    return dict(shaken(SwinUNETR(in_channels=1, out_channels=3, feature_size=12)).state_dict())


def swin_of(state: State, prefix: str = "swinViT.") -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def old_mlp(name: str) -> str:
    return name.replace("mlp.linear1", "mlp.fc1").replace("mlp.linear2", "mlp.fc2")


def simmim_name(name: str) -> str:
    return "encoder." + name.replace(".0.", ".0.0.", 1) if name.startswith("layers") else f"encoder.{name}"


HEADS = {"rotation_head.weight": torch.zeros(4, 768), "contrastive_head.bias": torch.zeros(8)}
FORMS: dict[str, tuple[str, Callable[[State], object]]] = {
    "monai_swin_unetr": ("swin_unetr", lambda state: state),
    "monai_model_swinvit": (
        "swin",
        lambda state: {"state_dict": {f"module.{old_mlp(name)}": v for name, v in swin_of(state).items()} | HEADS},
    ),
    "monai_ssl_head": ("swin_unetr", lambda state: {"state_dict": {old_mlp(k): v for k, v in state.items()} | HEADS}),
    "monai_ssl_pretrained": (
        "swin_simmim",
        lambda state: {
            "model": {simmim_name(name): value for name, value in swin_of(state).items()}
            | {"encoder.mask_token": torch.zeros(1, 12, 1, 1, 1), "encoder.norm.weight": torch.ones(192)}
        },
    ),
    "voco_flat": ("swin_unetr", lambda state: {f"backbone.{k}": v for k, v in state.items()} | HEADS),
    "voco_student": (
        "swin_unetr",
        lambda state: {"student": {f"module.backbone.{k}": v for k, v in state.items()}, "teacher": {}},
    ),
    "voco_large": ("swin_unetr", lambda state: {"network_weights": state, "current_epoch": 9}),
    "swin_vit": ("swin_unetr", lambda state: {k.replace("swinViT", "swin_vit"): v for k, v in state.items()}),
    "bare": ("swin", swin_of),
}


@pytest.mark.parametrize("form", FORMS)
def test_swin_files_of_other_programs_load_completely(tmp_path: Path, form: str) -> None:
    family, write = FORMS[form]
    state = unetr()
    torch.save(write(state), tmp_path / "w.pt")
    encoder = tiny_swin(1)
    report = load_weights(encoder, tmp_path / "w.pt")
    assert report.family == family and report.encoder_loaded == report.encoder_total == 118
    swin = swin_of(state)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, swin[name]), name
    own = read_own_weights(tmp_path / "w.pt", patch_merging="fixed")
    assert own.metadata["vision_encoder"] == tiny_swin(patch_merging="fixed").metadata()
    blocks = 11 if family == "swin_unetr" else 0
    assert len(own.tensors) == 118 + blocks and own.report.encoder_fraction == 1


def test_to_monai_and_back_with_the_encoder_blocks(tmp_path: Path) -> None:
    state = unetr()
    torch.save(state, tmp_path / "w.pt")
    own = read_own_weights(tmp_path / "w.pt")
    back, arguments = to_swin_unetr(own)
    assert len(back) == 126 + 11 and arguments["feature_size"] == 12
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    network = build_swin_unetr(own.metadata["vision_encoder"], out_channels=3)
    torch.save({"state_dict": back, "mg3d_metadata": own.metadata}, tmp_path / "back.pt")
    report = load_weights(network, tmp_path / "back.pt")
    assert len(report.loaded) == 137 and len(report.missing) == 22
    encoder = tiny_swin(5)
    load_weights(encoder, tmp_path / "w.pt")
    volume = torch.rand(1, 1, 32, 64, 32)
    with torch.no_grad():
        for ours, theirs in zip(encoder.eval()(volume), network.eval().swinViT(volume), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_genesis_weights_fit_the_unet(tmp_path: Path) -> None:
    encoder = create_vision_encoder("unet", base_width=4)
    rest = {"up_tr256.up_conv.weight": torch.zeros(4, 4, 2, 2, 2), "out_tr.final_conv.bias": torch.zeros(1)}
    state = {f"module.{name}": value for name, value in (encoder.state_dict() | rest).items()}
    torch.save({"state_dict": state, "epoch": 600}, tmp_path / "Genesis_Chest_CT.pt")
    target = create_vision_encoder("unet", base_width=4)
    report = load_weights(target, tmp_path / "Genesis_Chest_CT.pt")
    assert report.family == "unet" and report.encoder_fraction == 1 and len(report.unexpected) == 2
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in target.state_dict().items())


def two_dimensional(family: str) -> tuple[State, State]:
    """A METER or PTUnifier file around the text parts of a tiny network, and these parts under their names here."""
    network = tiny_network(legacy_unused_modules=True).state_dict()
    taken = ("language_encoder.", "multi_modal_language_", "multi_modal_vision_layers.", "modality_type_embeddings.")
    text = {name: torch.randn_like(value) for name, value in network.items() if name.startswith(taken)}
    renames = {
        "language_encoder.": "text_transformer.",
        "multi_modal_language_proj.": "cross_modal_text_transform.",
        "multi_modal_language_layers.": "cross_modal_text_layers.",
        "multi_modal_language_pooler.": "cross_modal_text_pooler.",
        "multi_modal_vision_layers.": "cross_modal_image_layers.",
        "modality_type_embeddings.": "token_type_embeddings.",
    }
    if family == "ptunifier":
        image = {"vision_encoder.visual.conv1.weight": torch.zeros(8, 3, 16, 16)}
        other = {"multi_modal_vision_proj.weight": torch.zeros(48, 48), "vqa_head.0.weight": torch.zeros(2, 48)}
        return text | image | other, text
    image = {"vit_model.visual.conv1.weight": torch.zeros(8, 3, 16, 16)}
    other = {"cross_modal_image_transform.weight": torch.zeros(48, 48), "vqa_classifier.0.weight": torch.zeros(2, 48)}
    prefixes = {name: next(prefix for prefix in renames if name.startswith(prefix)) for name in text}
    named = {renames[prefix] + name.removeprefix(prefix): text[name] for name, prefix in prefixes.items()}
    return named | image | other, text


@pytest.mark.parametrize("family", ["meter", "ptunifier"])
def test_2d_files_give_text_and_fusion_and_say_what_they_cannot(tmp_path: Path, family: str) -> None:
    state, text = two_dimensional(family)
    state["language_encoder.extra" if family == "ptunifier" else "text_transformer.extra"] = torch.zeros(2)
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    assert recognise(state) == family
    network = tiny_network(legacy_unused_modules=True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"(?s)covers only 0 of \d+.*text and fusion parts only"):
        load_weights(network, tmp_path / "w.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    report = load_weights(network, tmp_path / "w.ckpt", allow_partial=True)
    assert set(report.loaded) == set(text) and len(report.unexpected) == 1
    found = network.state_dict()
    assert all(torch.equal(found[name], text.get(name, before[name])) for name in found)
    assert sorted(report.dropped.values()) == sorted([TWO_DIMENSIONAL, OF_TWO_DIMENSIONAL, OTHER_TASK])
    assert TWO_DIMENSIONAL in str(report)


def test_ct_clip_gives_its_text_encoder_to_pre_training(tmp_path: Path) -> None:
    network = tiny_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    text = {name: torch.randn_like(value) for name, value in before.items() if name.startswith("language_encoder.")}
    state = {name.replace("language_encoder.", "text_transformer."): value for name, value in text.items()}
    state |= {"visual_transformer.x": torch.zeros(2), "to_visual_latent.weight": torch.zeros(2, 9)}
    torch.save({**state, "temperature": torch.tensor(1.0)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"(?s)covers only 0 of \d+.*a CT-CLIP file gives its text encoder only"):
        load_weights(network, tmp_path / "w.pt")
    report = load_weights(network, tmp_path / "w.pt", allow_partial=True)
    assert report.family == "ct_clip" and set(report.loaded) == set(text) and report.unexpected == ["temperature"]
    assert set(report.dropped.values()) == {OTHER_ENCODER, OF_OTHER_ENCODER}
    found = network.state_dict()
    assert all(torch.equal(found[name], text.get(name, before[name])) for name in found)


def test_a_2d_swin_is_not_taken_for_a_merging_conflict(tmp_path: Path) -> None:
    state = {
        "vision_encoder.patch_embed.proj.weight": torch.zeros(6, 3, 4, 4),
        "vision_encoder.layers.0.downsample.reduction.weight": torch.zeros(12, 24),
        "language_encoder.embeddings.position_ids": torch.arange(4)[None],
    }
    torch.save(state, tmp_path / "w.ckpt")
    network = tiny_network()
    report = load_weights(network, tmp_path / "w.ckpt", allow_partial=True)
    assert report.loaded == [] and len(report.dropped) == 3 and report.patch_merging == ""


def test_what_the_caller_knows_about_the_order_counts_only_where_the_file_is_silent(tmp_path: Path) -> None:
    torch.save(swin_of(unetr()), tmp_path / "silent.pt")
    with pytest.raises(CheckpointError, match="patch_merging=legacy"):
        load_weights(tiny_swin(1, "fixed"), tmp_path / "silent.pt")
    report = load_weights(tiny_swin(1, "fixed"), tmp_path / "silent.pt", patch_merging="fixed")
    assert report.patch_merging == "fixed" and "fixed merging" in str(report)
    said = {"state_dict": swin_of(unetr()), "mg3d_metadata": {"patch_merging": "fixed"}}
    torch.save(said, tmp_path / "said.pt")
    with pytest.raises(CheckpointError, match="says patch_merging='fixed', not 'legacy'"):
        load_weights(tiny_swin(1), tmp_path / "said.pt", patch_merging="legacy")


def test_a_variant_that_uses_the_learned_sums_is_warned_of_another_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tiny_network().state_dict()
    name = "local_text_cross_multihead_attention.0.fc2.weight"
    torch.save(dict(state) | {name: torch.zeros(1, 384)}, tmp_path / "w.pt")
    report = load_weights(tiny_network(), tmp_path / "w.pt")
    assert [entry[0] for entry in report.reshaped] == [name] and "stay random" not in caplog.text
    load_weights(tiny_network(fusion_variant="ctrate"), tmp_path / "w.pt")
    assert f"uses {name}, which stay random" in caplog.text


def test_one_tensor_under_two_prefixes_is_refused(tmp_path: Path) -> None:
    torch.save({"patch.weight": torch.zeros(2), "module.patch.weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="1 tensors twice"):
        load_weights(tiny_swin(), tmp_path / "w.pt")
