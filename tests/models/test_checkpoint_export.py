"""Export folders: bit-equal, complete, without places of the machine, and refused when their parts do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import tiny_swin, training_metadata
from safetensors.torch import load_file, save_file
from tiny_network import tiny_network

from mg3d.datasets.report_text import wordpiece_tokenizer_from_vocab
from mg3d.datasets.stored_geometry import published_geometry
from mg3d.errors import CheckpointError
from mg3d.models.checkpoint import describe_weights, load_weights, write_sidecar
from mg3d.models.export import export_folder, read_folder
from mg3d.models.vision_encoders import encoder_from_metadata

FILES = ["README.md", "config.json", "model.safetensors", "model.safetensors.sha256", "preprocessor.json", "tokenizer"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as training writes it, of a tiny network with a shared space, whose tokenizer lies in a folder."""
    network = tiny_network(objectives=("sen_mlm", "swin_unetr_mim", "local_itc", "itc"))
    network.half_entry = torch.nn.Parameter(torch.tensor([float("nan"), -0.0, 1e-45]))
    place = tmp_path / "private place" / "encoder"
    wordpiece_tokenizer_from_vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lung"]).save_pretrained(place)
    metadata = describe_weights(network, **training_metadata(network, str(place)), **published_geometry())
    torch.save({"state_dict": network.state_dict(), "mg3d_metadata": metadata, "epoch": 1}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_export_then_import_is_bit_equal(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_folder(
        checkpoint, tmp_path / "tiny-mg3d", licence="cc-by-nc-sa-4.0", training_data="240 phantom studies"
    )
    assert sorted(path.name for path in folder.iterdir()) == FILES
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = read_folder(folder)
    assert model.state.keys() == stored.keys()
    assert all(
        bits(model.state[name]) == bits(value) and model.state[name].dtype == value.dtype
        for name, value in stored.items()
    )
    again = read_folder(export_folder(folder, tmp_path / "again", tokenizer=model.tokenizer_dir))
    assert all(bits(again.state[name]) == bits(value) for name, value in stored.items())
    for key in ("licence", "training_data", "options", "vision_encoder", "shared_space", "weights"):
        if key != "weights":
            assert again.config[key] == model.config[key], key
    encoder = encoder_from_metadata(model.config["vision_encoder"])
    assert load_weights(encoder, folder).encoder_fraction == 1


def test_config_preprocessor_and_card_say_what_is_needed(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_folder(checkpoint, tmp_path / "m", licence="cc-by-nc-sa-4.0", training_data="240 phantom studies")
    model = read_folder(folder)
    config = model.config
    assert config["has_shared_space"] and "itc" in config["objectives"]
    assert config["shared_space"] == {"image_width": 48, "text_width": 48, "hidden_dim": 512, "embed_dim": 256}
    assert config["source_commit"] == "0" * 40 and config["patch_merging"] == "legacy"
    assert config["text_encoder"]["name"] == "encoder" and config["text_encoder"]["tokenizer"] == "tokenizer"
    assert config["text_encoder"]["config"]["num_hidden_layers"] == 2 and model.tokenizer_dir is not None
    assert config["licence"] == {"code": "Apache-2.0", "weights": "cc-by-nc-sa-4.0", "data": "not stated"}
    assert model.preprocessor == {
        "format_version": 1,
        "axis_order": "DHW=LPS(z,y,x)",
        "orientation": "LPS",
        "size_dhw": [64, 32, 32],
        "crop_fractions_dhw": [0.88, 0.65625, 0.875],
        "target_spacing_mm": [1.5, 0.75, 0.75],
        "window_hu": [-1000, 1000],
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = card.split("---")[1].splitlines()
    assert {"license: cc-by-nc-sa-4.0", "language: en", "library_name: mg3d"} <= set(header)
    assert "pipeline_tag: zero-shot-image-classification" in header and "- chest-ct" in header
    for part in ("## Use", "## Limits", "## Licences", "## Citation", "240 phantom studies", "Not a medical device"):
        assert part in card


def test_nothing_tells_where_it_was_made(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_folder(checkpoint, tmp_path / "m")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path.name for path in files if b"private place" in path.read_bytes()] == []


def test_a_foreign_file_needs_to_be_told_how_volumes_were_prepared(tmp_path: Path) -> None:
    torch.save(tiny_swin().state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="how volumes were prepared: spacing_mm"):
        export_folder(tmp_path / "w.pt", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".*partial"))
    grey = {**published_geometry(), "window_hu": "grey8", "spacing_mm": None, "input_size_dhw": [96, 96, 96]}
    model = read_folder(export_folder(tmp_path / "w.pt", tmp_path / "m", geometry=grey))
    assert model.preprocessor["window_hu"] == "grey8" and model.preprocessor["size_dhw"] == [96, 96, 96]
    assert model.config["architecture"] == "VisionEncoder" and not model.config["has_shared_space"]
    assert "zero-shot and image-text retrieval are refused" in (tmp_path / "m" / "README.md").read_text(
        encoding="utf-8"
    )


def test_an_existing_folder_is_replaced_only_on_request(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_folder(checkpoint, tmp_path / "m")
    with pytest.raises(CheckpointError, match="exists already"):
        export_folder(checkpoint, folder)
    (folder / "stale.txt").write_text("x")
    export_folder(checkpoint, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointError, match="no export folder and is not replaced"):
        export_folder(checkpoint, tmp_path / "photos", overwrite=True)


def test_parts_that_do_not_belong_together_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_folder(checkpoint, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cases = [
        ({"patch_merging": "fixed"}, "says patch_merging='fixed'"),
        ({"vision_encoder": config["vision_encoder"] | {"embed_dim": 96}}, "says embed_dim=96, the weights have 6"),
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "format version 1"),
        ({"weights": None}, "describes no model"),
    ]
    for changes, told in cases:
        edit(folder / "config.json", **changes)
        with pytest.raises(CheckpointError, match=told):
            read_folder(folder)
        (folder / "config.json").write_text(json.dumps(config))
    other = {
        name: value.half() if value.is_floating_point() else value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(other, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not match its checksum file"):
        read_folder(folder)
    write_sidecar(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds other tensors than config\.json"):
        read_folder(folder)


def test_incomplete_folders_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file, not an export folder"):
        read_folder(checkpoint)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_folder(tmp_path)
    folder = export_folder(checkpoint, tmp_path / "m")
    (folder / "preprocessor.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor\.json cannot be read"):
        read_folder(folder)
    (folder / "preprocessor.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        read_folder(folder)
