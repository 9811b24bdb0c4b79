"""Recordings of the image encoders: MONAI's own Swin transformer, and the U-Nets written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from formulas import linear, standardised
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer
from recipes_modules import cells
from recording import Draws, Recording, Tensors, prefixed, sampled, stored_precision
from torch import Tensor
from torch.nn import functional

TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


class OldMerging(PatchMergingV2):
    """The order of MONAI 0.9: two sub-grids twice, two never."""

    def forward(self, x: Tensor) -> Tensor:
        """Merge ``[B, D, H, W, C]``."""
        d, h, w = x.shape[1:4]
        x = functional.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        corners = ("000", "100", "010", "001", "101", "010", "001", "111")
        parts = [x[:, int(i) :: 2, int(j) :: 2, int(k) :: 2] for i, j, k in corners]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class NewMerging(OldMerging):
    """The corrected order."""

    def forward(self, x: Tensor) -> Tensor:
        """Merge ``[B, D, H, W, C]`` of even sizes."""
        corners = ("000", "100", "010", "001", "110", "101", "011", "111")
        parts = [x[:, int(i) :: 2, int(j) :: 2, int(k) :: 2] for i, j, k in corners]
        return self.reduction(self.norm(torch.cat(parts, -1)))


MERGING = {"legacy": OldMerging, "fixed": NewMerging}


def monai_swin(config: dict[str, Any], merging: str, seed: int) -> SwinTransformer:
    """MONAI's encoder with random weights."""
    sizes = {key: config[key] for key in ("embed_dim", "window_size", "patch_size", "depths", "num_heads")}
    net = SwinTransformer(1, downsample=MERGING[merging], mlp_ratio=config.get("mlp_ratio", 4.0), **sizes)
    draws = Draws(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(draws.normal(*parameter.shape, scale=0.1))
    return net.eval().double()


def state_of(net: torch.nn.Module) -> Tensors:
    """Parameters only: the index of the bias table is a constant."""
    return {name: value for name, value in net.state_dict().items() if not name.endswith("relative_position_index")}


def tokens_of(stage: Tensor) -> Tensor:
    """Tokens in D-major order."""
    return stage.flatten(2).transpose(1, 2)


SMALL = {"embed_dim": 4, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 2, 4]}
SMALL |= {"window_size": [3, 2, 4], "patch_size": [2, 1, 2], "mlp_ratio": 2.0}


def swin_with_gradients() -> list[Recording]:
    """State and results in two entries; masks, sampled forms and gradient norms."""
    config = SMALL | {"mask": {"numpy_seed": 3, "window": [8, 8, 8], "ratio": 0.25}}
    options = {"patch_merging": "legacy", "layer_norm_outputs": True}
    net, draws = monai_swin(config, "legacy", 1), Draws(2)
    grey = draws.grey(2, 1, 32, 16, 64)
    image = (grey.double() / 255).requires_grad_()
    stages = net(image, normalize=True)
    names = [name for name, _ in net.named_parameters()]
    cotangents = {f"x{k}": draws.normal(*stages[k].shape) for k in (1, 4)}
    scalar = sum((stages[int(name[1])] * value).sum() for name, value in cotangents.items())
    in_image, *by_name = torch.autograd.grad(scalar, [image, *net.parameters()], allow_unused=True)
    tensors = {f"out.x{k}": stage for k, stage in enumerate(stages)} | prefixed("cot.", cotangents)
    with torch.no_grad():
        tensors |= {f"raw.x{k}": stage for k, stage in enumerate(net(image, normalize=False))}
        hidden = cells(3, (4, 2, 8), 0.25)
        masked = net(image * torch.from_numpy(1 - np.kron(hidden, np.ones((8, 8, 8)))), normalize=True)
    tensors |= {"tokens": tokens_of(stages[4]), "mask.cells": torch.from_numpy(hidden).to(torch.uint8)}
    tensors |= {"mask.x4": masked[4], "mask.x2": masked[2], "grad.in.image": in_image}
    tensors["grad_l2"] = torch.stack([value.norm() for value in by_name])
    tensors["grad.param.patch_embed.proj.weight"] = by_name[names.index("patch_embed.proj.weight")]
    forms = {"out.x0": [(1, 1, 4, 8, 2), "mean_std"], "raw.x0": ["l2"], "grad.in.image": [(1, 1, 4, 2, 8), "l2"]}
    tensors = sampled(stored_precision(tensors), forms) | {"in.image_u8": grey}
    shared = {"config": config | {"grad_l2_names": names}, "options": options, "tolerance": TOLERANCE}
    state = stored_precision(state_of(net))
    return [
        Recording("coarse weights", "swin", state, role="state", uses=["coarse run"], parts=2, **shared),
        Recording("coarse run", "swin", tensors, uses=["coarse weights"], **shared),
    ]


def swin_in_three() -> list[Recording]:
    """Weights that name no partner, a repeated coarse image, and results; corrected merging."""
    config = SMALL | {"window_size": [2, 2, 2], "patch_size": [2, 2, 2]}
    net, draws = monai_swin(config, "fixed", 4), Draws(5)
    coarse = draws.grey(1, 1, 8, 16, 8)
    image = coarse.double() / 255
    for axis in (2, 3, 4):
        image = image.repeat_interleave(4, axis)
    with torch.no_grad():
        stages = net(image, normalize=True)
    tensors = stored_precision({f"out.x{k}": stage for k, stage in enumerate(stages)})
    tensors = sampled(tensors, {"out.x0": [(1, 2, 4, 4, 4)], "out.x1": ["mean_std", "l2"]})
    shared = {"config": config, "options": {"patch_merging": "fixed"}, "tolerance": TOLERANCE}
    names = ["third weights", "third image", "third run"]
    return [
        Recording(names[0], "swin", stored_precision(state_of(net)), role="state", **shared),
        Recording(names[1], "swin", {"in.coarse_u8": coarse}, uses=[names[0], names[2]], results=[], **shared),
        Recording(names[2], "swin", tensors, uses=names[:2], **shared),
    ]


def swin_with_head() -> list[Recording]:
    """Tokens through the projection head, normalised per position over batch and channels."""
    config = SMALL | {"embed_dim": 2, "num_heads": [1, 1, 2, 2], "proj_head": {"hidden_dim": 12, "out_dim": 7}}
    config["window_size"] = [2, 2, 2]
    net, draws = monai_swin(config, "legacy", 6), Draws(7)
    width = 16 * config["embed_dim"]
    shapes = {"layer1.0.weight": (12, width), "layer1.0.bias": (12,), "layer2.0.weight": (12, 12)}
    shapes |= {"layer2.0.bias": (12,), "layer3.0.weight": (7, 12), "layer3.0.bias": (7,)}
    head = draws.state(shapes)
    image = torch.rand(3, 1, 32, 16, 32, generator=draws.generator)

    def projected(tokens: Tensor) -> Tensor:
        precise = {name: value.double() for name, value in head.items()}
        for layer in ("layer1.0", "layer2.0"):
            tokens = standardised(linear(precise, layer, tokens), (0, 2)).relu()
        return linear(precise, "layer3.0", tokens)

    with torch.no_grad():
        last = net(image.double(), normalize=True)[4]
        tokens = tokens_of(last)
        found = {"x4_normalized": last, "tokens": tokens, "proj": projected(tokens)}
        found["proj_of_first_sample_alone"] = projected(tokens[:1])
    state = stored_precision(state_of(net)) | prefixed("proj_head.", head)
    shared = {"config": config, "options": {"patch_merging": "legacy"}, "tolerance": TOLERANCE}
    return [
        Recording("wide weights", "swin_l", state, role="state", uses=["wide run"], **shared),
        Recording("wide run", "swin_l", stored_precision(found) | {"in.image": image}, uses=["wide weights"], **shared),
    ]


def index_of_window(edge: int) -> Recording:
    """Row of the bias table of every pair of cells."""
    places = [(d, h, w) for d in range(edge) for h in range(edge) for w in range(edge)]
    reach = 2 * edge - 1
    rows = [
        [((a - d + edge - 1) * reach + b - h + edge - 1) * reach + c - w + edge - 1 for d, h, w in places]
        for a, b, c in places
    ]
    return Recording("table", "relative_position_index", {"index": torch.tensor(rows, dtype=torch.int16)})


def unet(name: str, family: str, width: int, batch_statistics: bool, seed: int) -> Recording:
    """Four double convolutions with batch norm, max-pool between them, average pool at the end."""
    draws = Draws(seed)
    state: Tensors = {}
    channels = 1
    for stage, depth in zip(("down_tr64", "down_tr128", "down_tr256", "down_tr512"), range(4), strict=True):
        for k, out in enumerate((width * 2**depth, 2 * width * 2**depth)):
            prefix = f"{stage}.ops.{k}"
            scale = (27 * channels) ** -0.5
            state |= {f"{prefix}.conv1.weight": draws.normal(out, channels, 3, 3, 3, scale=scale)}
            state |= {f"{prefix}.{part}": draws.normal(out, scale=0.3) for part in ("conv1.bias", "bn1.bias")}
            state |= {f"{prefix}.bn1.weight": 1 + draws.normal(out, scale=0.1)}
            state |= {f"{prefix}.bn1.running_mean": draws.normal(out, scale=0.1)}
            state |= {f"{prefix}.bn1.running_var": 0.5 + draws.normal(out).square()}
            state |= {f"{prefix}.bn1.num_batches_tracked": torch.tensor(4)}
            channels = out
    grey = draws.grey(2, 1, 32, 64, 32)
    image = grey.double() / 255
    found = {"out": unet_output(state, image, batch_statistics)}
    found["tokens"] = tokens_of(found["out"])
    if batch_statistics:
        found["out_first_sample_alone"] = unet_output(state, image[:1], batch_statistics)
    tensors = prefixed("state.", state) | {"in.image_u8": grey} | stored_precision(found)
    return Recording(name, family, tensors, config={"base_width": width}, tolerance=TOLERANCE)


def unet_output(state: Tensors, x: Tensor, batch_statistics: bool) -> Tensor:
    """Last map of the U-Net."""
    state = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    prefixes = [name.removesuffix(".conv1.weight") for name in state if name.endswith(".conv1.weight")]
    for k, prefix in enumerate(prefixes):
        if k and k % 2 == 0:
            x = functional.max_pool3d(x, 2)
        x = functional.conv3d(x, state[f"{prefix}.conv1.weight"], state[f"{prefix}.conv1.bias"], padding=1)
        if batch_statistics:
            x = standardised(x, (0, 2, 3, 4))
        else:
            mean, variance = (state[f"{prefix}.bn1.running_{part}"].view(1, -1, 1, 1, 1) for part in ("mean", "var"))
            x = (x - mean) / (variance + 1e-5).sqrt()
        scale, shift = (state[f"{prefix}.bn1.{part}"].view(1, -1, 1, 1, 1) for part in ("weight", "bias"))
        x = (x * scale + shift).relu()
    return functional.avg_pool3d(x, 4)


def recordings() -> list[Recording]:
    """Everything of this file."""
    return [
        index_of_window(3),
        *swin_with_gradients(),
        *swin_in_three(),
        *swin_with_head(),
        unet("always", "unet3d_genesis", 2, True, 8),
        unet("ordinary", "unet3d_pcrlv2", 1, False, 9),
    ]
