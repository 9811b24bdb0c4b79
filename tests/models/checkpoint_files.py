"""Weights files as other programs write them, tiny or of published size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder
from mg3d.models.vision_encoders.swin import MERGING_OFFSETS

TINY_SWIN = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24)}
POSITION_IDS = "language_encoder.embeddings.position_ids"


def random_state(shapes: dict[str, dict], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of recorded shapes and dtypes; entries above a million numbers repeat one number."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, entry in shapes.items():
        shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
        if dtype.is_floating_point:
            few = torch.Size(shape).numel() > 10**6 and not name.startswith("vision_encoder.")
            state[name] = torch.randn([1] * len(shape) if few else shape, generator=rng).expand(shape)
        else:
            state[name] = torch.randint(0, 9, shape, generator=rng, dtype=dtype)
    return state


def manifest_state(reference_dir: Path, encoder: str = "swin_b") -> dict[str, Tensor]:
    """Every key of a released checkpoint: the common ones, the encoder's, the queues and the old position ids."""
    manifest = json.loads((reference_dir / "manifests" / "state_dict_manifest.json").read_text(encoding="utf-8"))
    shapes = manifest["common"] | manifest["vision_encoder"][encoder]["keys"] | manifest["optional_buffers"]
    return random_state(shapes) | {POSITION_IDS: torch.arange(512)[None]}


def tiny_swin(seed: int = 0, patch_merging: str = "legacy", name: str = "swin_b", **options: object) -> VisionEncoder:
    """Swin of four stages with randomised norms, so that every entry counts."""
    torch.manual_seed(seed)
    return shaken(create_vision_encoder(name, patch_merging=patch_merging, **(TINY_SWIN | options)))


def shaken(module: nn.Module) -> nn.Module:
    """Move every parameter a little away from its initial value (zeros and ones included)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


class GivenMerging(nn.Module):
    """Patch merging with any offsets, in the form MONAI's ``downsample`` takes; written apart from the package's."""

    offsets = MERGING_OFFSETS["legacy"]

    def __init__(self, dim: int, norm_layer: type[nn.Module] = nn.LayerNorm, spatial_dims: int = 3) -> None:
        super().__init__()
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        assert not any(size % 2 for size in x.shape[1:4])
        grids = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).unflatten(5, (-1, 2))
        return self.reduction(self.norm(torch.cat([grids[:, :, d, :, h, :, w] for d, h, w in self.offsets], -1)))


def training_metadata(network: nn.Module, text_encoder: str) -> dict[str, object]:
    """What a training module adds to the description of a network."""
    return {
        "architecture": "MG3DNetwork",
        "mg3d_version": "0.1.0",
        "input_size_dhw": list(network.options.volume_size),
        "token_grid_dhw": list(network.token_grid),
        "text_encoder": text_encoder,
        "text_encoder_revision": "sha256:0",
        "text_encoder_config": network.language_encoder.plain_config(),
        "objectives": list(network.options.objectives),
        "has_shared_space": "image_text_itc_head" in network._modules,
        "options": {"hidden_size": network.options.hidden_size, "max_text_len": network.options.max_text_len},
        "datasets": ["clm_ct_rate"],
        "licence": {"code": "Apache-2.0", "weights": "not stated", "data": "not stated"},
        "source_commit": "0" * 40,
    }
