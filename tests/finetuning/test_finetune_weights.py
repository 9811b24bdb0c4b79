"""Pre-trained encoders in fine-tuning modules: what is loaded, what is refused, in which sizes and merging order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_benchmark import BALLS, OUTLINES
from torch import Tensor

from mg3d.errors import CheckpointError, ConfigError
from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config
from mg3d.finetuning.kinds import build_module
from mg3d.finetuning.names import weights_label
from mg3d.models.checkpoint import METADATA_KEY, describe_weights
from mg3d.models.finetune.weights import build_encoder, load_encoder_weights
from mg3d.models.vision_encoders import create_vision_encoder

TINY = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}


def encoder_tensors(seed: int = 1, width: int = 12) -> dict[str, Tensor]:
    """The 126 entries of a Swin encoder as published: 8 of them are constant indices, which follow from its window."""
    torch.manual_seed(seed)
    encoder = create_vision_encoder("swin_b", embed_dim=width)
    encoder.keep_index_entries()
    return encoder.state_dict()


def released(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The flat names of a released file, with 20 entries that are no encoder's."""
    named = {f"vision_encoder.{name}": value for name, value in encoder.items()}
    return named | {f"language_encoder.layer{k}.weight": torch.randn(3) for k in range(20)}


def config(path: Path, **more: Any) -> FinetuneConfig:
    """Keys that concern weights."""
    return resolve_finetune_config({"weights": str(path), **more})


WRAPS = {
    "flat": lambda tensors: tensors,
    "state_dict": lambda tensors: {"state_dict": tensors},
    "module": lambda tensors: {"state_dict": {f"module.{name}": value for name, value in tensors.items()}},
    "network_weights": lambda tensors: {"network_weights": tensors},
}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A segmentation module in the sizes of the released file."""
    path = tmp_path_factory.mktemp("released") / "swin.pt"
    torch.save(released(encoder_tensors()), path)
    return build_module(config(path), OUTLINES.task, 1)


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_126_entries_are_loaded_and_nothing_else(wrap: str, segmenter: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "swin.pt", segmenter
    encoder = encoder_tensors(seed=list(WRAPS).index(wrap) + 2)
    torch.save(WRAPS[wrap](released(encoder)), path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = load_encoder_weights(module, config(path))
    assert len(encoder) == len(report.loaded) == 126
    assert report.encoder_loaded == report.encoder_total == 118  # what is learned
    assert not report.reshaped and len(report.unexpected) == 20 and report.patch_merging == "legacy"
    loaded = module.encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.items())
    places = {value.data_ptr() for value in loaded.values()}
    rest = {name: value for name, value in module.state_dict().items() if value.data_ptr() not in places}
    assert rest and all(torch.equal(before[name], value) for name, value in rest.items())
    assert len(report.missing) == len(rest) == 33  # 11 of the skip blocks, 22 of decoder and output


def test_classification_head_stays_random(tmp_path: Path) -> None:
    path = tmp_path / "swin.pt"
    torch.save({**released(encoder_tensors()), "head.0.weight": torch.zeros(1, 192)}, path)
    cfg = config(path)
    module = build_module(cfg, BALLS.task, 1)
    before = {name: value.clone() for name, value in module.head.state_dict().items()}
    report = load_encoder_weights(module, cfg)
    assert report.encoder_loaded == 118 and len(report.dropped) == 9  # the constants, and the head of another task
    assert all(torch.equal(value, before[name]) for name, value in module.head.state_dict().items())


def test_blocks_of_a_segmentation_file_are_taken_too(segmenter: Any, tmp_path: Path) -> None:
    blocks = {
        name[name.index("encoder") :]: value
        for name, value in segmenter.network.state_dict().items()
        if name.startswith(("encoder1.", "encoder2.", "encoder3.", "encoder4.", "encoder10."))
    }
    path = tmp_path / "swin_l.pt"
    torch.save(released(encoder_tensors()) | {f"vision_encoder.{n}": v for n, v in blocks.items()}, path)
    report = load_encoder_weights(segmenter, config(path))
    assert len(blocks) == 11 and len(report.loaded) == 137 and len(report.missing) == 22


def test_another_width_names_the_first_tensor_and_too_little_is_refused(tmp_path: Path) -> None:
    wide, little = tmp_path / "wide.pt", tmp_path / "little.pt"
    torch.save(released(encoder_tensors(width=24)), wide)
    module = build_module(resolve_finetune_config({"feature_size": 12}), BALLS.task, 1)
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.weight \(24, 1, 2, 2, 2\) -> \(12, 1, 2, 2, 2\)"):
        load_encoder_weights(module, config(wide, patch_merging="fixed"))
    entries = encoder_tensors()
    part = {name: value for name, value in entries.items() if not name.startswith("layers4.0.downsample")}
    part = dict(list(part.items())[:-10])
    torch.save(released(part), little)
    with pytest.raises(CheckpointError, match=r"covers only 10[0-9] of 118"):
        load_encoder_weights(module, config(little, patch_merging="fixed"))
    report = load_encoder_weights(module, config(little, patch_merging="fixed", allow_partial=True))
    assert 0 < report.encoder_loaded < 112


def test_sizes_and_merging_follow_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    own = create_vision_encoder("swin_b", patch_merging="fixed", **TINY)
    holder = torch.nn.ModuleDict({"vision_encoder": own})
    torch.save({"state_dict": holder.state_dict(), METADATA_KEY: describe_weights(holder)}, path)
    cfg = config(path)
    built = build_encoder(cfg)
    assert built.metadata() == own.metadata()
    assert build_encoder(config(path, scratch=True)).metadata() == own.metadata(), "the baseline has the same sizes"
    module = build_module(cfg, BALLS.task, 1)
    assert load_encoder_weights(module, cfg).patch_merging == "fixed"
    with pytest.raises(ConfigError, match="feature_size=0"):
        build_encoder(config(path, feature_size=48))
    with pytest.raises(ConfigError, match="encoder=swin_b"):
        build_encoder(config(path, encoder="unet"))
    with pytest.raises(CheckpointError, match="legacy"):
        build_encoder(config(path, patch_merging="legacy"))


def test_merging_is_legacy_for_files_that_do_not_say_and_fixed_from_scratch(tmp_path: Path) -> None:
    path = tmp_path / "published.pt"
    torch.save(released(encoder_tensors()), path)
    assert build_encoder(config(path)).metadata()["patch_merging"] == "legacy"
    assert build_encoder(config(path, patch_merging="fixed")).metadata()["patch_merging"] == "fixed"
    assert build_encoder(resolve_finetune_config({"feature_size": 12})).metadata()["patch_merging"] == "fixed"


def test_names_of_weights_in_folders_and_tables() -> None:
    assert weights_label("") == ""
    assert weights_label("/data/swin_b.pt") == "swin_b"
    assert weights_label("result/demo-seed0-from_/version_3/checkpoints/last.ckpt") == "demo-seed0-from_-version_3"
    assert weights_label("result/demo-seed0-from_/version_3") == "demo-seed0-from_-version_3"
    assert weights_label("export/model.safetensors") == "export"
    assert weights_label("org/name") == "name"
