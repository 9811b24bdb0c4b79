"""The published `image_size` switch: one number stands for a whole (D, H, W) grid (specification section 1)."""

from __future__ import annotations

from collections.abc import Sequence

from mg3d.errors import ConfigError

__all__ = ["ENCODER_STRIDE", "IMAGE_SIZES", "resolve_volume_size"]

ENCODER_STRIDE = 32

# Token counts 27, 48, 50, 36 are published. The two flat grids are the axial blocks 160 x 160 x 64 and 192 x 192 x 32
# (in-plane axes first) that have those counts; the latter is the published block of downstream tasks. 224 belongs to
# the 2-D image settings that published command lines carry: it stands for the published volume geometry.
IMAGE_SIZES: dict[int, tuple[int, int, int]] = {
    96: (96, 96, 96),
    128: (128, 96, 128),
    160: (64, 160, 160),
    192: (32, 192, 192),
    224: (128, 96, 128),
}


def resolve_volume_size(image_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Voxels (D, H, W) that a value of `image_size` stands for.

    Args:
        image_size: a published switch value (96, 128, 160, 192, or 224 of the 2-D settings) or three voxel counts.

    Returns:
        (D, H, W), each a multiple of the encoder's total stride 32.

    Raises:
        ConfigError: no switch value, not three numbers, or not divisible by 32 (the message names the nearest size).
    """
    if isinstance(image_size, int):
        if image_size not in IMAGE_SIZES:
            raise ConfigError(
                f"image_size={image_size} is not allowed\n  allowed: 96, 128, 160, 192, or [D,H,W] in multiples of 32",
                f"write image_size={_text(_nearest((image_size,) * 3))} for a cube",
            )
        return IMAGE_SIZES[image_size]
    if len(image_size) != 3:
        raise ConfigError(
            f"image_size={list(image_size)} has {len(image_size)} numbers, not D, H, W", "write image_size=[128,96,128]"
        )
    if any(edge % ENCODER_STRIDE or edge < ENCODER_STRIDE for edge in image_size):
        raise ConfigError(
            f"image_size={_text(image_size)}: each axis must be a multiple of {ENCODER_STRIDE}, the total stride",
            f"write image_size={_text(_nearest(image_size))}, the nearest size",
        )
    depth, height, width = image_size
    return depth, height, width


def _nearest(size: Sequence[int]) -> list[int]:
    return [max(1, int(edge / ENCODER_STRIDE + 0.5)) * ENCODER_STRIDE for edge in size]


def _text(size: Sequence[int]) -> str:
    return "[" + ",".join(str(edge) for edge in size) + "]"
