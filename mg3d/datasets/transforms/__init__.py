"""Image transforms by published key; each maps a unit-range volume ``[D, H, W]`` to another of the asked size."""

from __future__ import annotations

from mg3d.datasets.transforms.registry import TRANSFORMS, VolumeTransform, create_transform

__all__ = ["TRANSFORMS", "VolumeTransform", "create_transform"]
