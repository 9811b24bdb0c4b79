"""nnU-Net encoders, plain and residual, built from nnU-Net's own blocks so that weights move both ways.

No published MG-3D source defines its "nn-UNet": these are NOT reference-compatible (spec pretraining 6.3), the layout
is nnU-Net v2's. Parameters carry the names that they have in nnU-Net's ``PlainConvUNet`` and ``ResidualEncoderUNet``
(``encoder.stem.*``, ``encoder.stages.*``); files of nnU-Net are :mod:`mg3d.models.nnunet_format`.

The blocks come from the package dynamic-network-architectures. Shape suffixes: B batch, C channels, D/H/W volume axes,
N tokens, E token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mg3d.models.vision_encoders.base import VisionEncoder, channel_norm, check_volume, map_to_tokens, pad_to_multiple

PLAIN, RESIDUAL = "nnunet", "nnunet_resenc"
FEATURES = (32, 64, 128, 256, 320, 320)
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6)
"""Residual blocks per stage of nnU-Net's ResEnc presets."""

_ALIAS = ".all_modules."
_Triple = tuple[int, int, int]
# What nnU-Net's planner chooses for 3-D networks.
_LAYERS: dict[str, Any] = {
    "conv_op": nn.Conv3d,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}


class NNUNetEncoder(VisionEncoder):
    """Encoder of an nnU-Net v2 network: stages of strided convolution, instance norm and LeakyReLU (slope 0.01).

    Not reference-compatible: the authors announce "nn-UNet" weights without any code, so this layout is our choice.
    Tokens are the last stage's map as it is. As every channel of it leaves an instance norm, the mean over tokens
    holds little more than the spread of the channels; prefer the tokens themselves where that matters.

    Each axis is zero-padded at its end to a multiple of the stride. The state dict holds every tensor once; nnU-Net's
    second names (``all_modules``) are accepted on loading.

    Args:
        name: ``nnunet`` (plain) or ``nnunet_resenc`` (residual).
        features_per_stage: channels of the stages.
        strides: stride of every stage, one number or one per axis; None: 1, then 2.
        kernel_sizes: kernel edge, one number, or one entry (number or one per axis) for every stage.
        blocks_per_stage: convolutions (plain) or residual blocks per stage, one number or one per stage; None: two
            convolutions, or 1, 3, 4, 6, 6, 6 residual blocks.
        gradient_checkpointing: recompute stage activations in the backward pass.

    Raises:
        ValueError: unknown name, or lengths and sizes that do not fit.
    """

    def __init__(
        self,
        *,
        name: str = PLAIN,
        features_per_stage: Sequence[int] = FEATURES,
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: int | Sequence[int | Sequence[int]] = 3,
        blocks_per_stage: int | Sequence[int] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if name not in (PLAIN, RESIDUAL):
            raise ValueError(f"name must be {PLAIN} or {RESIDUAL}, got {name!r}")
        count = len(features_per_stage)
        if blocks_per_stage is None:
            blocks_per_stage = RESIDUAL_BLOCKS[:count] if name == RESIDUAL else 2
        self.name, self.gradient_checkpointing = name, gradient_checkpointing
        self.stage_channels = _counts(features_per_stage, count, "features_per_stage")
        self.stage_strides = _triples([1] + [2] * (count - 1) if strides is None else strides, count, "strides")
        self.kernel_sizes = _triples(kernel_sizes, count, "kernel_sizes")
        self.blocks_per_stage = _counts(blocks_per_stage, count, "blocks_per_stage")
        self.out_channels, self.stride = self.stage_channels[-1], _total(self.stage_strides)
        self.encoder = _build(self)
        self.register_state_dict_post_hook(_leave_out_aliases)
        self.register_load_state_dict_pre_hook(_fill_in_aliases)

    def forward_features(self, vol_B1DHW: Tensor, normalize: bool = False) -> list[Tensor]:
        """Compute the maps of all stages, which are nnU-Net's skip connections.

        Args:
            vol_B1DHW: volumes in [0, 1].
            normalize: channel LayerNorm without parameters on every map; nnU-Net has none.

        Returns:
            Maps ``[B, C_k, D_k, H_k, W_k]``, finest first.

        Raises:
            ValueError: a volume of one token, over which instance norm is undefined.
        """
        check_volume(vol_B1DHW)
        self.token_grid(vol_B1DHW.shape[2:])
        hidden = pad_to_multiple(vol_B1DHW, self.stride)
        if isinstance(self.encoder, ResidualEncoder):
            hidden = self._run_stage(self.encoder.stem, hidden)
        maps: list[Tensor] = []
        for stage in self.encoder.stages:
            hidden = self._run_stage(stage, hidden)
            maps.append(hidden)
        return [channel_norm(each) for each in maps] if normalize else maps

    def forward(self, vol_B1DHW: Tensor, normalize: bool = False) -> list[Tensor]:
        """Same as :meth:`forward_features`."""
        return self.forward_features(vol_B1DHW, normalize)

    def tokens(self, vol_B1DHW: Tensor) -> Tensor:
        """Encode to tokens ``[B, N, E]``: the last map in D-major order, as it is."""
        return map_to_tokens(self.forward_features(vol_B1DHW)[-1])

    def token_grid(self, size_dhw: Sequence[int]) -> tuple[int, int, int]:
        """Number of tokens along D, H and W for a volume of ``size_dhw`` voxels.

        Raises:
            ValueError: a single token.
        """
        grid = super().token_grid(size_dhw)
        if grid == (1, 1, 1):
            raise ValueError(
                f"a volume of {'x'.join(map(str, size_dhw))} voxels gives one token at stride {self.stride}, over "
                "which instance norm is undefined: use a larger volume or fewer stages"
            )
        return grid

    def metadata(self) -> dict[str, Any]:
        """Architecture in plain types; enough to rebuild the encoder."""
        return {
            "name": self.name,
            "features_per_stage": list(self.stage_channels),
            "strides": [list(step) for step in self.stage_strides],
            "kernel_sizes": [list(edges) for edges in self.kernel_sizes],
            "blocks_per_stage": list(self.blocks_per_stage),
            "out_channels": self.out_channels,
            "stride": list(self.stride),
        }

    def _run_stage(self, stage: nn.Module, hidden: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, hidden, use_reentrant=False)
        return stage(hidden)


def build_nnunet(patch_merging: str = "legacy", **options: Any) -> NNUNetEncoder:
    """Plain nnU-Net encoder: six stages of two convolutions, 320 channels at stride 32; it merges no patches."""
    return NNUNetEncoder(**({"name": PLAIN} | options))


def build_nnunet_resenc(patch_merging: str = "legacy", **options: Any) -> NNUNetEncoder:
    """Encoder of nnU-Net's ResEnc M preset: a stem and 1, 3, 4, 6, 6, 6 residual blocks; it merges no patches."""
    return NNUNetEncoder(**({"name": RESIDUAL} | options))


def _build(encoder: NNUNetEncoder) -> PlainConvEncoder | ResidualEncoder:
    """Encoder module of an nnU-Net with nnU-Net's initial weights."""
    residual = encoder.name == RESIDUAL
    built = (ResidualEncoder if residual else PlainConvEncoder)(
        input_channels=1,
        n_stages=len(encoder.stage_channels),
        features_per_stage=encoder.stage_channels,
        kernel_sizes=encoder.kernel_sizes,
        strides=encoder.stage_strides,
        return_skips=True,
        **{"n_blocks_per_stage" if residual else "n_conv_per_stage": encoder.blocks_per_stage},
        **_LAYERS,
    )
    built.apply(InitWeights_He(1e-2))
    built.apply(init_last_bn_before_add_to_0)
    return built


def _leave_out_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and _ALIAS in key]:
        state.pop(key)


def _fill_in_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give both names of every tensor, whichever of them the state holds: the blocks register their layers twice."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(prefix + name)
    for group in names.values():
        present = [name for name in group if name in state]
        if present:
            state.update({name: state[present[0]] for name in group if name not in state})


def _counts(values: int | Sequence[int], count: int, key: str) -> tuple[int, ...]:
    numbers = (values,) * count if isinstance(values, int) else tuple(int(value) for value in values)
    if not numbers or len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"{key} must hold a positive number for each of the {count} stages, got {values!r}")
    return numbers


def _triples(values: int | Sequence[int | Sequence[int]], count: int, key: str) -> tuple[_Triple, ...]:
    entries = [values] * count if isinstance(values, int) else list(values)
    edges = [(entry,) * 3 if isinstance(entry, int) else tuple(int(edge) for edge in entry) for entry in entries]
    if len(edges) != count or any(len(entry) != 3 or min(entry) < 1 for entry in edges):
        raise ValueError(f"{key} must be one or three positive integers for each of the {count} stages, got {values!r}")
    return tuple((entry[0], entry[1], entry[2]) for entry in edges)


def _total(strides: Sequence[_Triple]) -> _Triple:
    total = [1, 1, 1]
    for step in strides:
        total = [whole * part for whole, part in zip(total, step, strict=True)]
    return total[0], total[1], total[2]
