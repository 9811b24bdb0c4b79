"""nnU-Net encoders against the network that nnU-Net v2 itself builds; its files are in test_nnunet_format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder, encoder_from_metadata

NAMES = pytest.mark.parametrize("name", ["nnunet", "nnunet_resenc"])
SMALL = {"features_per_stage": (3, 4, 5, 6, 7, 8)}
FLAT = {  # as nnU-Net plans it for thick slices
    "features_per_stage": (4, 6, 8),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "blocks_per_stage": (1, 2, 1),
}


def shaken(name: str, **options: Any) -> VisionEncoder:
    """Encoder whose norms, which start at 0 and 1, are moved too."""
    torch.manual_seed(3)
    encoder = create_vision_encoder(name, **options)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder


def nnunets_own(name: str, **sizes: Any) -> nn.Module:
    """The network of nnU-Net's planner, spelled as in its plans files."""
    count = len(sizes["features_per_stage"])
    residual = name == "nnunet_resenc"
    default = (1, 3, 4, 6, 6, 6) if residual else (2,) * 6
    arguments = {
        "n_stages": count,
        "features_per_stage": sizes["features_per_stage"],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": sizes.get("kernel_sizes", [[3, 3, 3]] * 6),
        "strides": sizes.get("strides", [[1, 1, 1]] + [[2, 2, 2]] * 5),
        "n_blocks_per_stage" if residual else "n_conv_per_stage": sizes.get("blocks_per_stage", default),
        "n_conv_per_stage_decoder": [1 if residual else 2] * (count - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    to_import = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    torch.manual_seed(4)
    return get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{kind}", arguments, to_import, 1, 3, deep_supervision=True
    )


@NAMES
@pytest.mark.parametrize("sizes", [SMALL, FLAT], ids=["cubic", "thick slices"])
def test_weights_move_to_nnunets_network_and_back(name: str, sizes: dict[str, Any]) -> None:
    ours, theirs = shaken(name, **sizes), nnunets_own(name, **sizes)
    volume = torch.rand(2, 1, 32, 64, 64)

    lacking, unknown = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unknown and not [key for key in lacking if key.startswith("encoder.") and ".all_modules." not in key]
    with torch.no_grad():
        one, other = ours.forward_features(volume), theirs.encoder(volume)
    assert len(one) == len(other) == len(sizes["features_per_stage"])
    for stage, (left, right) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(left, right), stage
    assert torch.equal(ours.tokens(volume), other[-1].flatten(2).transpose(1, 2))

    fresh = nnunets_own(name, **sizes)
    state = {key: value for key, value in fresh.state_dict().items() if key.startswith("encoder.")}
    assert any(".all_modules." in key for key in state)
    ours.load_state_dict(state, strict=True)
    with torch.no_grad():
        for left, right in zip(ours(volume), fresh.encoder(volume), strict=True):
            assert torch.equal(left, right)


@NAMES
def test_the_published_layout_is_nnunets(name: str) -> None:
    with torch.device("meta"):
        encoder = create_vision_encoder(name)
        theirs = nnunets_own(name, features_per_stage=(32, 64, 128, 256, 320, 320)).get_submodule("encoder")
    wanted = {f"encoder.{key}": value.shape for key, value in theirs.named_parameters()}
    assert {key: value.shape for key, value in encoder.named_parameters()} == wanted
    assert encoder.token_grid((128, 96, 128)) == (4, 3, 4) and encoder.out_channels == 320
    assert encoder.stage_channels == (32, 64, 128, 256, 320, 320)


@NAMES
def test_the_first_weights_are_drawn_as_nnunet_draws_them(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = create_vision_encoder(name, **SMALL), nnunets_own(name, **SMALL)
    other = dict(theirs.get_submodule("encoder").named_parameters())
    kernels = 0
    for key, value in ours.named_parameters():
        twin = other[key.removeprefix("encoder.")]
        if value.dim() == 5 and value.numel() > 500:
            kernels += 1
            torch.testing.assert_close(value.std(), twin.std(), rtol=0.15, atol=0)
        elif value.dim() == 1:
            assert torch.equal(value, twin), key
    assert kernels > 3


@NAMES
def test_the_state_holds_every_tensor_once_and_takes_either_name(name: str) -> None:
    source = shaken(name, **SMALL)
    state = source.state_dict()
    assert sum(value.numel() for value in state.values()) == source.parameter_count()
    places = {"conv": "0", "norm": "1"}
    other_names = {
        ".".join([*path[:-2], "all_modules", places[path[-2]], path[-1]]): value
        for path, value in ((key.split("."), value) for key, value in state.items())
    }
    target = encoder_from_metadata(source.metadata())
    target.load_state_dict(other_names, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())
    holder = nn.ModuleDict({"vision_encoder": encoder_from_metadata(source.metadata())})
    nested = {f"vision_encoder.{key}": value for key, value in state.items()}
    assert holder.state_dict().keys() == nested.keys()
    holder.load_state_dict(nested, strict=True)
    first = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({key: value for key, value in state.items() if key != first}, strict=True)


@NAMES
def test_checkpointing_changes_no_gradient(name: str) -> None:
    volume, gradients = torch.rand(2, 1, 64, 32, 32), []
    plain = shaken(name, **SMALL)
    saving = create_vision_encoder(name, gradient_checkpointing=True, **SMALL)
    saving.load_state_dict(plain.state_dict())
    for encoder in (plain.train(), saving.train()):
        encoder.tokens(volume).square().sum().backward()
        gradients.append({key: value.grad for key, value in encoder.named_parameters()})
    for key, value in gradients[0].items():
        assert value is not None and bool(value.isfinite().all()), key
        torch.testing.assert_close(value, gradients[1][key], msg=key)


@NAMES
def test_samples_do_not_influence_each_other_and_padding_is_zeros(name: str) -> None:
    encoder = shaken(name, **SMALL).eval()
    volume = torch.rand(2, 1, 40, 33, 20)
    padded = torch.zeros(2, 1, 64, 64, 32)
    padded[:, :, :40, :33, :20] = volume
    with torch.no_grad():
        together = encoder.tokens(volume)
        alone = torch.cat([encoder.tokens(each[None]) for each in volume])
        torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(encoder.tokens(padded), together, rtol=1e-3, atol=1e-3)
    assert float((together[0] - together[1]).abs().max()) > 0.1


def test_a_volume_of_a_single_token_is_refused_because_instance_norm_would_erase_it() -> None:
    encoder = create_vision_encoder("nnunet", **SMALL)
    with pytest.raises(ValueError, match="a volume of 32x20x32 voxels gives one token"):
        encoder.tokens(torch.rand(1, 1, 32, 20, 32))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"features_per_stage": ()}, "features_per_stage"),
        ({"features_per_stage": (4, 0)}, "features_per_stage"),
        ({"strides": (1, 2)}, "strides"),
        ({"strides": ((1, 1), *(2,) * 5)}, "strides"),
        ({"kernel_sizes": (3, 3)}, "kernel_sizes"),
        ({"blocks_per_stage": (2, 2)}, "blocks_per_stage"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        create_vision_encoder("nnunet", **options)


@NAMES
def test_bfloat16_autocast_stays_close(name: str) -> None:
    encoder, volume = create_vision_encoder(name, **SMALL), torch.rand(1, 1, 64, 64, 32)
    with torch.no_grad():
        exact = encoder.tokens(volume)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = encoder.tokens(volume).float()
    assert float((rough - exact).abs().mean()) < 0.1 * float(exact.abs().mean())
