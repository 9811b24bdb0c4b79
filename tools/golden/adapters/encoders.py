"""Vision encoders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mg3d.datasets.volume import to_unit_range
from mg3d.mim_cells import cell_grid, reference_cells
from mg3d.models.masking import apply_mask
from mg3d.models.vision_encoders.registry import create_vision_encoder
from tools.golden.adapters.common import compare, loaded
from tools.golden.bundle import Bundle
from tools.golden.measure import cube_edge

SWIN_OPTIONS = ("embed_dim", "depths", "num_heads", "window_size", "patch_size", "mlp_ratio")


def _swin(bundle: Bundle, name: str, **options: object) -> nn.Module:
    options |= {key: bundle.config[key] for key in SWIN_OPTIONS if key in bundle.config}
    encoder = create_vision_encoder(name, patch_merging=bundle.options["patch_merging"], **options)
    return loaded(encoder, bundle.state())


def _input_size(bundle: Bundle, stride: Sequence[int]) -> list[int]:
    """Voxels per axis of a volume that was stored coarsely: the last stage's grid times the encoder's stride."""
    deepest = max(name for name in bundle.names("out.x") if name.removeprefix("out.x").isdigit())
    grid = bundle.peek(deepest).shape[2:]
    return [cells * step for cells, step in zip(grid, stride, strict=True)]


def _volume(bundle: Bundle, encoder: nn.Module) -> Tensor:
    """The model input: stored as float, as 8-bit grey, or as coarse 8-bit grey whose voxels are repeated."""
    names = ("in.image", "in.image_u8", "in.coarse_u8")
    stored = bundle.read(next((name for name in names if bundle.has(name)), "in.image"))
    if not stored.dtype.is_floating_point:
        stored = torch.from_numpy(to_unit_range(stored.numpy()))
    if bundle.has("in.coarse_u8"):
        stored = nn.functional.interpolate(stored, size=_input_size(bundle, encoder.stride), mode="nearest")
    return stored.clone().requires_grad_()


def relative_position_index(bundle: Bundle) -> None:
    """Index of the bias table; without a setting, its window is the cube with as many cells as the index has rows."""
    window = bundle.config.get("window_size", cube_edge(len(bundle.peek("index"))))
    encoder = create_vision_encoder("swin_b", window_size=window)
    bundle.check("index", encoder.layers1[0].blocks[0].attn.relative_position_index)


def swin(bundle: Bundle) -> None:
    """All stages, tokens, gradients, and a forward pass with masked cells."""
    encoder = _swin(bundle, "swin_b")
    volume = _volume(bundle, encoder)
    stages = encoder.forward_features(volume, normalize=bundle.options.get("layer_norm_outputs", True))
    outputs = {f"x{position}": stage for position, stage in enumerate(stages)}
    compare(bundle, encoder, {"image": volume}, outputs)
    with torch.no_grad():
        for position, stage in enumerate(encoder.forward_features(volume, normalize=False)):
            bundle.check(f"raw.x{position}", stage)
        bundle.check("tokens", encoder.tokens(volume))
        if "mask" in bundle.config:
            _masked(bundle, encoder, volume)


def _masked(bundle: Bundle, encoder: nn.Module, volume: Tensor) -> None:
    mask = bundle.config["mask"]
    window = mask["window"][0]
    generator = np.random.RandomState(mask["numpy_seed"])
    cells = torch.from_numpy(reference_cells(cell_grid(volume.shape[2:], window), mask["ratio"], generator))
    bundle.check("mask.cells", cells)
    for position, stage in enumerate(encoder.forward_features(apply_mask(volume, cells, window))):
        bundle.check(f"mask.x{position}", stage)


def swin_l(bundle: Bundle) -> None:
    """Tokens before and after the projection head, for the batch and for its first sample alone."""
    head = bundle.config["proj_head"]
    encoder = _swin(bundle, "swin_l", proj_hidden_dim=head["hidden_dim"], proj_out_dim=head["out_dim"])
    volume = _volume(bundle, encoder)
    with torch.no_grad():
        last = encoder.forward_features(volume)[-1]
        bundle.check("x4_normalized", last)
        bundle.check("tokens", last.flatten(2).transpose(1, 2))
        bundle.check("proj", encoder.tokens(volume))
        bundle.check("proj_of_first_sample_alone", encoder.tokens(volume[:1]))


def _unet(bundle: Bundle, name: str) -> None:
    encoder = loaded(create_vision_encoder(name, base_width=bundle.config["base_width"]), bundle.state())
    volume = _volume(bundle, encoder)
    compare(bundle, encoder, {"image": volume}, {"out": encoder.forward_features(volume)[-1]})
    bundle.check("tokens", encoder.tokens(volume))
    bundle.check("out_first_sample_alone", encoder.forward_features(volume[:1])[-1])


def unet(bundle: Bundle) -> None:
    """U-Net that always normalises with batch statistics."""
    _unet(bundle, "unet")


def unet_pcrlv2(bundle: Bundle) -> None:
    """U-Net with ordinary batch norm."""
    _unet(bundle, "unet_pcrlv2")
