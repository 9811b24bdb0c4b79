from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from safetensors.torch import save_file
from torch import Tensor, nn

from mg3d.errors import CheckpointError
from mg3d.models.checkpoint import (
    METADATA_KEY,
    describe_weights,
    load_checkpoint,
    load_state_file,
    load_weights,
    read_weights_file,
    save_weights,
    write_sidecar,
)
from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder
from mg3d.models.weights_file import verify_sidecar

TINY = {"embed_dim": 4, "depths": (2, 2), "num_heads": (2, 4), "window_size": 3}


def tiny(seed: int = 0, patch_merging: str = "legacy", **options: object) -> VisionEncoder:
    torch.manual_seed(seed)
    return create_vision_encoder("swin_b", patch_merging=patch_merging, **(TINY | options))


class Network(nn.Module):
    """An encoder under its published name, with other parts around it."""

    def __init__(self, seed: int = 0, patch_merging: str = "legacy", tokens: int = 48) -> None:
        super().__init__()
        self.vision_encoder = tiny(seed, patch_merging)
        self.mlm_head = nn.Linear(3, 3)
        self.fc1 = nn.Linear(tokens, 1)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


WRAPS: dict[str, Callable[[dict], object]] = {
    "flat": lambda state: state,
    "lightning": lambda state: {"state_dict": state, "epoch": 3, "hyper_parameters": {"seed": 0}},
    "network_weights": lambda state: {"network_weights": state, "current_epoch": 1},
    "net": lambda state: {"net": state},
    "student": lambda state: {"student": state, "teacher": {}},
    "model": lambda state: {"model": {"state_dict": state}},
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "backbone": lambda state: {"state_dict": {f"module.backbone.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("wrap", sorted(WRAPS))
def test_every_accepted_form_gives_the_same_tensors(tmp_path: Path, wrap: str) -> None:
    state = tiny().state_dict()
    torch.save(WRAPS[wrap](state), tmp_path / "w.pt")
    assert same(load_state_file(tmp_path / "w.pt"), dict(state))


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors_are_recognised_by_content(tmp_path: Path, name: str) -> None:
    state = tiny().state_dict()
    save_file(dict(state), tmp_path / name)
    assert same(load_state_file(tmp_path / name), dict(state))


def test_saved_weights_come_back_with_metadata_and_checksum(tmp_path: Path) -> None:
    network = Network(patch_merging="fixed")
    path = save_weights(network, tmp_path / "w.safetensors", describe_weights(network, axis_order="DHW"))
    file = read_weights_file(path)
    assert same(file.tensors, dict(network.state_dict()))
    assert file.metadata["patch_merging"] == "fixed" and file.metadata["axis_order"] == "DHW"
    assert file.metadata["vision_encoder"]["embed_dim"] == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["w.safetensors", "w.safetensors.sha256"]


def test_network_loads_completely_and_reports_it(tmp_path: Path) -> None:
    source, target = Network(1), Network(2)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.ckpt")
    report = load_weights(target, tmp_path / "w.ckpt")
    assert same(dict(source.state_dict()), dict(target.state_dict()))
    assert len(report.loaded) == len(source.state_dict()) and report.encoder_fraction == 1
    assert not (report.renamed or report.missing or report.unexpected or report.reshaped)
    assert f"loaded {len(report.loaded)}" in str(report)
    json.dumps(report.as_dict())


def test_encoder_of_a_network_file_fits_a_bare_encoder_and_back(tmp_path: Path) -> None:
    source, bare = Network(1), tiny(2)
    torch.save(source.state_dict(), tmp_path / "network.pt")
    report = load_weights(bare, tmp_path / "network.pt")
    assert same(dict(source.vision_encoder.state_dict()), dict(bare.state_dict()))
    assert len(report.renamed) == len(report.loaded) == len(bare.state_dict())
    assert sorted(report.unexpected) == ["fc1.bias", "fc1.weight", "mlm_head.bias", "mlm_head.weight"]
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    target = Network(3)
    report = load_weights(target, tmp_path / "bare.pt")
    assert same(dict(target.vision_encoder.state_dict()), dict(bare.state_dict()))
    assert sorted(report.missing) == ["fc1.bias", "fc1.weight", "mlm_head.bias", "mlm_head.weight"]


def test_published_swin_b_into_swin_unetr_by_the_measured_counts(tmp_path: Path) -> None:
    encoder = create_vision_encoder("swin_b", embed_dim=12, patch_merging="fixed")
    state = {f"vision_encoder.{key}": value for key, value in encoder.state_dict().items()}
    state |= {f"vision_encoder.{n}": b for n, b in encoder.named_buffers() if n.endswith("relative_position_index")}
    torch.save({"state_dict": state, METADATA_KEY: {"patch_merging": "fixed"}}, tmp_path / "w.pt")
    unetr = SwinUNETR(in_channels=1, out_channels=4, feature_size=12)
    report = load_weights(unetr, tmp_path / "w.pt")
    assert len(report.loaded) == 126 and len(report.missing) == 33
    volume = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(unetr.swinViT(volume)[4], encoder(volume)[4], rtol=1e-4, atol=1e-5)


def test_constant_buffers_of_old_files_are_dropped_and_old_mlp_names_understood(tmp_path: Path) -> None:
    source = tiny(1)
    state = {key.replace(".linear", ".fc"): value for key, value in source.state_dict().items()}
    state["layers1.0.blocks.0.attn.relative_position_index"] = torch.zeros(2, 2, dtype=torch.int64)
    state["language_encoder.embeddings.position_ids"] = torch.arange(4)[None]
    torch.save(state, tmp_path / "w.pt")
    target = tiny(2)
    report = load_weights(target, tmp_path / "w.pt")
    assert same(dict(source.state_dict()), dict(target.state_dict()))
    assert len(report.dropped) == 2 and not report.unexpected


def test_tensors_of_another_shape_are_left_out_and_named(tmp_path: Path) -> None:
    torch.save(Network(1, tokens=384).state_dict(), tmp_path / "w.pt")
    target = Network(2, tokens=48)
    kept = target.fc1.weight.detach().clone()
    report = load_weights(target, tmp_path / "w.pt")
    assert report.reshaped == [("fc1.weight", (1, 384), (1, 48))]
    assert torch.equal(target.fc1.weight, kept) and "fc1.weight" in str(report)


def test_too_little_encoder_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    torch.save(tiny(1, embed_dim=8).state_dict(), tmp_path / "w.pt")
    target = tiny(2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"covers only \d+ of \d+"):
        load_weights(target, tmp_path / "w.pt")
    assert same(before, dict(target.state_dict()))
    report = load_weights(target, tmp_path / "w.pt", allow_partial=True)
    assert 0 < report.encoder_fraction < 0.95


def test_a_file_without_metadata_is_legacy_and_the_other_order_is_refused(tmp_path: Path) -> None:
    torch.save(tiny(1).state_dict(), tmp_path / "published.pt")
    load_weights(tiny(2, "legacy"), tmp_path / "published.pt")
    with pytest.raises(CheckpointError, match=r"(?s)'legacy'.*'fixed'.*patch_merging=legacy"):
        load_weights(tiny(2, "fixed"), tmp_path / "published.pt")
    with pytest.raises(CheckpointError, match="legacy"):
        load_weights(SwinUNETR(in_channels=1, out_channels=2, feature_size=12), tmp_path / "published.pt")


@pytest.mark.parametrize(
    "extra",
    [
        {METADATA_KEY: {"patch_merging": "fixed"}},
        {METADATA_KEY: {"vision_encoder": {"patch_merging": "fixed"}}},
        {"hyper_parameters": {"patch_merging": "fixed"}},
        {"hyper_parameters": {"config": {"patch_merging": "fixed"}}},
    ],
)
def test_the_stored_order_decides(tmp_path: Path, extra: dict) -> None:
    torch.save({"state_dict": tiny(1, "fixed").state_dict()} | extra, tmp_path / "w.ckpt")
    load_weights(tiny(2, "fixed"), tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match="patch_merging=fixed"):
        load_weights(tiny(2, "legacy"), tmp_path / "w.ckpt")


def write_torch(path: Path) -> None:
    torch.save({"state_dict": Network().state_dict()}, path)


def write_safetensors(path: Path) -> None:
    save_weights(Network(), path, {})
    path.with_name(f"{path.name}.sha256").unlink()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_truncated_files_are_refused(tmp_path: Path, write: Callable[[Path], None], share: float) -> None:
    path = tmp_path / ("w.ckpt" if write is write_torch else "w.safetensors")
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_state_file(path)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_in_a_torch_file_is_found_without_a_checksum_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"weight": torch.arange(4096.0)}, path)
    flip(path, path.stat().st_size // 2)
    assert not torch.equal(torch.load(path, weights_only=True)["weight"], torch.arange(4096.0))
    with pytest.raises(CheckpointError, match="checksum"):
        load_state_file(path)


def test_a_flipped_bit_is_found_by_the_checksum_file(tmp_path: Path) -> None:
    path = save_weights({"weight": torch.arange(4096.0)}, tmp_path / "w.safetensors", {})
    assert torch.equal(load_state_file(path)["weight"], torch.arange(4096.0))
    flip(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"does not match.*sha256"):
        load_state_file(path)


def test_checksum_file_of_a_torch_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(3)}, "epoch": 2}, path)
    assert write_sidecar(path).read_text(encoding="utf-8").split()[1] == "last.ckpt"
    assert load_checkpoint(path)["epoch"] == 2
    flip(path, 100)
    with pytest.raises(CheckpointError, match="does not match"):
        load_checkpoint(path)


def test_checksum_file_with_a_note_and_two_digests(tmp_path: Path) -> None:
    path = save_weights({"weight": torch.ones(3)}, tmp_path / "w.safetensors", {})
    sidecar = tmp_path / "w.safetensors.sha256"
    own = sidecar.read_text(encoding="utf-8")
    sidecar.write_text(f"# step 3\n{'0' * 64}  w.safetensors\n{own}")
    assert verify_sidecar(path)
    sidecar.write_text("# step 3\n")
    assert not verify_sidecar(path)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_wants_to_act_is_not_run(tmp_path: Path, writer: Callable) -> None:
    writer({"state_dict": {"w": Evil(tmp_path / "touched")}}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"more than tensors|damaged"):
        load_state_file(tmp_path / "evil.ckpt")
    assert not (tmp_path / "touched").exists()


def test_what_is_not_a_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory"):
        load_state_file(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_state_file(tmp_path / "none.ckpt")
    (tmp_path / "page.pt").write_text("<!doctype html><html>quota exceeded</html>" * 9)
    with pytest.raises(CheckpointError, match="no weights file"):
        load_state_file(tmp_path / "page.pt")
    torch.save({"epoch": 3, "state_dict": {"name": "x"}}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        load_state_file(tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="list"):
        load_state_file(tmp_path / "list.pt")
