"""Files with every key of a released checkpoint, into every kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import GivenMerging, manifest_state, random_state
from monai.networks.nets.swin_unetr import SwinTransformer, SwinUNETR
from tiny_network import bert_config
from transformers import BertModel

from mg3d.models.checkpoint import load_weights, match_tensors
from mg3d.models.conversion import read_own_weights
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.network import MG3DNetwork
from mg3d.models.options import NetworkOptions
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.models.vision_encoders.monai_swin import LegacyPatchMerging, build_swin_unetr

INDEX = ".relative_position_index"


@pytest.fixture(scope="module")
def released(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A flat file with every key of the released Swin-B checkpoint, and its tensors."""
    state = manifest_state(reference_dir)
    path = tmp_path_factory.mktemp("released") / "swin_b_47k.pt"
    torch.save(state, path)
    return path, state


@pytest.mark.parametrize("encoder", ["swin_b", "swin_l", "unet", "unet_pcrlv2_candidate"])
def test_every_encoder_of_the_manifest_loads_completely(reference_dir: Path, tmp_path: Path, encoder: str) -> None:
    state = manifest_state(reference_dir, encoder)
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    model = create_vision_encoder(encoder.removesuffix("_candidate"))
    report = load_weights(model, tmp_path / "w.ckpt")
    own = {key.removeprefix("vision_encoder."): value for key, value in state.items() if key.startswith("vision_enc")}
    dropped = {key for key in own if key.endswith(INDEX) or key.startswith("head.")}
    assert report.encoder_fraction == 1 and not report.missing and not report.reshaped
    assert len(report.loaded) == len(own) - len(dropped) == len(model.state_dict())
    assert {key.removeprefix("vision_encoder.") for key in report.dropped} >= dropped
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name]), name


def test_126_entries_of_159_reach_monais_swin_unetr_value_by_value(released: tuple) -> None:
    path, state = released
    network = SwinUNETR(in_channels=1, out_channels=4, feature_size=48, downsample=LegacyPatchMerging)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = load_weights(network, path)
    assert (len(report.loaded), len(report.missing), len(before)) == (126, 33, 159)
    assert sum(name.startswith("encoder") for name in report.missing) == 11
    assert report.encoder_loaded == report.encoder_total == 118 and report.patch_merging == "legacy"
    for name, value in network.state_dict().items():
        swin = name.startswith("swinViT.")
        wanted = state[f"vision_encoder.{name.removeprefix('swinViT.')}"] if swin else before[name]
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize(("fc_length", "reshaped"), [(384, 4), (48, 0)])
def test_the_whole_network_takes_every_key_with_either_fc_length(
    reference_dir: Path, fc_length: int, reshaped: int
) -> None:
    state = manifest_state(reference_dir)
    lengths = {name: value for name, value in state.items() if tuple(value.shape) == (1, 384)}
    assert len(lengths) == 4 and all("cross_multihead_attention" in name for name in lengths)
    state |= {name: torch.randn(1, fc_length) for name in lengths}
    sizes = {"layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512}
    with torch.device("meta"):
        text = BertTextEncoder(BertModel(bert_config(28996, 768, **sizes)))
        network = MG3DNetwork(create_vision_encoder("swin_b"), text, NetworkOptions(legacy_unused_modules=True))
    assigned, report = match_tensors(state, network.state_dict())
    keys = len(state)
    assert keys == 526 + 126 + 12 + 1
    assert len(report.loaded) == keys - 8 - 1 - 12 - reshaped and not report.renamed
    assert report.counts()["dropped"] == 8 + 1 + 12 and not report.unexpected and not report.missing
    assert sorted(name for name, _, _ in report.reshaped) == (sorted(lengths) if reshaped else [])
    assert report.encoder_loaded == report.encoder_total == 118
    assert all(assigned[name] is state[name] for name in report.loaded)
    json.dumps(report.as_dict())


def test_the_shapes_of_a_released_file_describe_it(released: tuple) -> None:
    own = read_own_weights(released[0])
    assert own.metadata["vision_encoder"] == create_vision_encoder("swin_b").metadata()
    assert own.metadata["input_size_dhw"] == [128, 96, 128] and own.metadata["patch_merging"] == "legacy"
    text = own.metadata["text_encoder_config"]
    assert (text["vocab_size"], text["num_hidden_layers"], text["num_attention_heads"]) == (28996, 12, 12)
    assert own.metadata["options"]["max_text_len"] == 250 and not own.metadata["has_shared_space"]
    assert own.merging_assumed and len(own.tensors) == 526 + 118


@pytest.mark.parametrize(("order", "size"), [("legacy", (64, 32, 32)), ("fixed", (32, 32, 64))])
def test_swin_b_agrees_with_monai_given_the_same_offsets(
    reference_dir: Path, tmp_path: Path, order: str, size: tuple[int, int, int]
) -> None:
    manifest = json.loads((reference_dir / "manifests" / "state_dict_manifest.json").read_text(encoding="utf-8"))
    keys = manifest["vision_encoder"]["swin_b"]["keys"]
    state = {name: 0.02 * value for name, value in random_state(keys).items() if not name.endswith(INDEX)}
    torch.save(state, tmp_path / "w.pt")
    encoder = create_vision_encoder("swin_b", patch_merging=order)
    load_weights(encoder, tmp_path / "w.pt", patch_merging=order)
    merging = GivenMerging if order == "legacy" else "merging"
    swin = SwinTransformer(1, 48, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), downsample=merging)
    swin.load_state_dict({key.removeprefix("vision_encoder."): value for key, value in state.items()}, strict=False)
    volume = torch.rand(1, 1, *size)
    with torch.no_grad():
        for ours, theirs in zip(encoder.eval()(volume), swin.eval()(volume), strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-6 * max(1.0, float(theirs.abs().max()))


def test_the_package_builds_swin_unetr_in_either_order(released: tuple) -> None:
    encoder = create_vision_encoder("swin_b", embed_dim=12, patch_merging="fixed")
    assert type(build_swin_unetr(encoder.metadata(), 3).swinViT.layers1[0].downsample).__name__ == "PatchMerging"
    legacy = build_swin_unetr({**encoder.metadata(), "patch_merging": "legacy"}, 3)
    assert isinstance(legacy.swinViT.layers1[0].downsample, LegacyPatchMerging)
    with pytest.raises(ValueError, match="Swin encoder of four stages"):
        build_swin_unetr(create_vision_encoder("unet", base_width=4).metadata(), 3)


@pytest.mark.slow
def test_every_value_of_a_whole_checkpoint_arrives(reference_dir: Path, tmp_path: Path) -> None:
    manifest = json.loads((reference_dir / "manifests" / "state_dict_manifest.json").read_text(encoding="utf-8"))
    shapes = manifest["common"] | manifest["vision_encoder"]["swin_b"]["keys"]
    rng = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(entry["shape"], generator=rng)
        for name, entry in shapes.items()
        if entry["dtype"] == "float32"
    }
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    sizes = {"layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512}
    text = BertTextEncoder(BertModel(bert_config(28996, 768, **sizes)))
    network = MG3DNetwork(create_vision_encoder("swin_b"), text, NetworkOptions(legacy_unused_modules=True))
    report = load_weights(network, tmp_path / "w.ckpt")
    found = network.state_dict()
    assert len(report.loaded) == len(state) - 4 and not report.missing and not report.unexpected
    assert all(torch.equal(found[name], state[name]) for name in report.loaded)
