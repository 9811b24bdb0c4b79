from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_support import check_outputs, load_entry, under

from mg3d.models.vision_encoders import create_vision_encoder


@pytest.mark.parametrize("name", ["unet", "unet_pcrlv2"])
def test_recorded_outputs(golden_dir: Path, name: str) -> None:
    tensors, record = load_entry(golden_dir, "unet3d_genesis" if name == "unet" else "unet3d_pcrlv2")
    encoder = create_vision_encoder(name, base_width=record["config"]["base_width"]).eval()
    encoder.load_state_dict(under(tensors, "state"), strict=True)
    image = tensors["in.image_u8"].float() / 255
    with torch.no_grad():
        got = {"out": encoder(image)[-1], "tokens": encoder.tokens(image)}
        check_outputs(got, {key: tensors[key] for key in got}, record)
        if name == "unet":
            alone = {"alone": encoder(image[:1])[-1]}
            check_outputs(alone, {"alone": tensors["out_first_sample_alone"]}, record)


def test_genesis_style_uses_batch_statistics_in_eval_and_updates_its_buffers() -> None:
    torch.manual_seed(0)
    encoder = create_vision_encoder("unet", base_width=1).eval()
    volume = torch.rand(2, 1, 32, 32, 32)
    before = encoder.state_dict()["down_tr64.ops.0.bn1.running_mean"].clone()
    with torch.no_grad():
        together, alone = encoder.tokens(volume), encoder.tokens(volume[:1])
    assert not torch.allclose(together[:1], alone)
    assert not torch.equal(before, encoder.state_dict()["down_tr64.ops.0.bn1.running_mean"])


def test_pcrlv2_style_is_an_ordinary_batch_norm_in_eval() -> None:
    torch.manual_seed(0)
    encoder = create_vision_encoder("unet_pcrlv2", base_width=1).eval()
    volume = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.tokens(volume)[:1], encoder.tokens(volume[:1]))


@pytest.mark.parametrize("size", [(32, 32, 64), (33, 20, 40)])
def test_sizes_are_padded_to_whole_tokens(size: tuple[int, int, int]) -> None:
    encoder = create_vision_encoder("unet", base_width=1)
    with torch.no_grad():
        maps = encoder(torch.rand(2, 1, *size), normalize=True)
    assert tuple(maps[-1].shape[2:]) == encoder.token_grid(size)
    assert [each.shape[1] for each in maps] == list(encoder.stage_channels)
    torch.testing.assert_close(maps[0].mean(1), torch.zeros_like(maps[0][:, 0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["unet", "unet_pcrlv2"])
def test_checkpointing_changes_neither_gradients_nor_statistics(name: str) -> None:
    volume, runs = torch.rand(2, 1, 32, 32, 32), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        encoder = create_vision_encoder(name, base_width=1, gradient_checkpointing=checkpointing).train()
        encoder.tokens(volume).square().sum().backward()
        runs.append((dict(encoder.named_buffers()), {k: p.grad for k, p in encoder.named_parameters()}))
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], msg=key)


def test_published_width_gives_tokens_of_768() -> None:
    with torch.device("meta"):
        encoder = create_vision_encoder("unet")
    assert encoder.out_channels == 768 and encoder.stride == (32, 32, 32)
    assert encoder.metadata() == {"name": "unet", "base_width": 48, "out_channels": 768, "stride": [32, 32, 32]}
