from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mg3d import config_schema
from mg3d.errors import ConfigError, EnvironmentProblem
from mg3d.models.vision_encoders import VISION_ENCODERS, VisionEncoder, create_vision_encoder, encoder_from_metadata

SMALL = {
    "swin_b": {"embed_dim": 3, "window_size": 3},
    "swin_l": {"embed_dim": 3, "window_size": (3, 2, 3), "proj_hidden_dim": 6, "proj_out_dim": 8},
    "unet": {"base_width": 1},
    "unet_pcrlv2": {"base_width": 1},
    "nnunet": {"features_per_stage": (2, 3, 4, 5, 6, 7)},
    "nnunet_resenc": {"features_per_stage": (2, 3, 4, 5, 6, 7), "blocks_per_stage": (1, 1, 2, 1, 1, 1)},
}
PUBLISHED = {  # millions of weights, token width
    "swin_b": (8.062002, 768),
    "swin_l": (33.955074, 768),
    "unet": (15.808608, 768),
    "unet_pcrlv2": (15.808608, 768),
    "nnunet": (14.02512, 320),
    "nnunet_resenc": (90.296576, 320),
}
EVERY = pytest.mark.parametrize("name", sorted(VISION_ENCODERS))


def small(name: str) -> VisionEncoder:
    torch.manual_seed(0)
    return create_vision_encoder(name, patch_merging="fixed", **SMALL[name]).eval()


@EVERY
def test_every_name_builds_and_describes_itself(name: str) -> None:
    encoder = small(name)
    assert encoder.metadata()["name"] == name == encoder.name
    assert encoder.token_grid((128, 96, 128)) == (4, 3, 4)


@EVERY
def test_every_encoder_is_rebuilt_from_its_own_description_and_state(name: str) -> None:
    encoder = small(name)
    again = encoder_from_metadata(json.loads(json.dumps(encoder.metadata())))
    again.load_state_dict(encoder.state_dict(), strict=True)
    assert type(again) is type(encoder) and again.metadata() == encoder.metadata()
    volume = torch.rand(2, 1, 64, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval().tokens(volume), encoder.tokens(volume))


@EVERY
@pytest.mark.parametrize("size", [(64, 32, 32), (33, 40, 20)])
def test_every_encoder_keeps_the_promises_of_the_interface(name: str, size: tuple[int, int, int]) -> None:
    encoder, volume = small(name), torch.rand(2, 1, *size)
    with torch.no_grad():
        maps, tokens, pooled = encoder.forward_features(volume), encoder.tokens(volume), encoder.pool(volume)
        normalised = encoder.forward_features(volume, normalize=True)
    assert [each.shape[1] for each in maps] == list(encoder.stage_channels)
    assert tuple(maps[-1].shape[2:]) == encoder.token_grid(size)
    assert tokens.shape == (2, maps[-1][0, 0].numel(), encoder.out_channels)
    assert torch.equal(pooled, tokens.mean(dim=1))
    torch.testing.assert_close(normalised[0].mean(1), torch.zeros_like(maps[0][:, 0]), atol=1e-3, rtol=0)
    assert [each.shape for each in normalised] == [each.shape for each in maps]


@EVERY
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        encoder = create_vision_encoder(name)
    assert encoder.parameter_count() == round(PUBLISHED[name][0] * 1e6)
    assert encoder.out_channels == PUBLISHED[name][1] and encoder.stride == (32, 32, 32)


def test_the_config_knows_every_encoder_and_a_tiny_form_of_it() -> None:
    assert set(config_schema.VISION_ENCODERS) == set(config_schema.TINY_ENCODERS) == set(VISION_ENCODERS)
    for name, options in config_schema.TINY_ENCODERS.items():
        assert create_vision_encoder(name, **options).parameter_count() < 1_000_000


@pytest.mark.parametrize("name", ["swin_b", "unet", "nnunet"])
def test_compiled_features_are_the_same_and_train(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small(name)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # the graphs that would be compiled, run as they are: no C++ compiler, seconds instead of minutes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = create_vision_encoder(name, patch_merging="fixed", compile_features=True, **SMALL[name]).eval()
    compiled.load_state_dict(plain.state_dict(), strict=True)
    volume = torch.rand(2, 1, 64, 32, 32)
    plain.tokens(volume).square().sum().backward()
    compiled.tokens(volume).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing went through the compiler"
    torch.testing.assert_close(compiled.tokens(volume), plain.tokens(volume))
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_unknown_name_lists_all_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="swin_x") as caught:
        create_vision_encoder("swin_x")
    assert isinstance(caught.value, ConfigError)
    assert "did you mean 'swin_" in str(caught.value)
    assert all(name in str(caught.value) for name in VISION_ENCODERS)


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"embed_dims.*\n.*'embed_dim'"):
        create_vision_encoder("swin_b", embed_dims=12)
    with pytest.raises(ValueError, match="base_width"):
        create_vision_encoder("unet", embed_dim=12)


@pytest.mark.parametrize("name", ["nnunet", "nnunet_resenc"])
def test_a_missing_library_is_named_with_the_mend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [each for each in sys.modules if each.startswith("dynamic_network_architectures")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "mg3d.models.vision_encoders.nnunet", raising=False)
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    with pytest.raises(EnvironmentProblem, match=r"dynamic_network_architectures.*\n.*requirements-nodeps\.txt"):
        create_vision_encoder(name)
    assert create_vision_encoder("unet", base_width=1).name == "unet"


def test_naming_encoders_does_not_import_their_libraries(repository: Path) -> None:
    code = "import sys; from mg3d.models.vision_encoders import VISION_ENCODERS; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
