"""Transform keys to classes, and the published keys that make no sense in three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import numpy as np

from mg3d.datasets.transforms.clip import Clip
from mg3d.datasets.transforms.volume_resized_crop import VolumeResizedCrop


class VolumeTransform(Protocol):
    """Maps a unit-range volume to the size the model takes."""

    def __call__(self, unit_DHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return float32 ``[D, H, W]``."""


TRANSFORMS: Final[Mapping[str, Callable[[Sequence[int]], VolumeTransform]]] = {
    "clip": Clip,
    "volume_resizedcrop": VolumeResizedCrop,
}
_REFUSED: Final = {
    "clip_resizedcrop": "it crops every slice at another place; use clip (published) or volume_resizedcrop",
    "clip_randaug": "it augments nothing and skips the crop; use clip",
}


def create_transform(keys: Sequence[str], size_dhw: Sequence[int]) -> VolumeTransform:
    """Return the transform of a config list such as ``["clip"]``.

    Raises:
        ValueError: not exactly one key, an unknown key, or a published key that is refused in three dimensions.
    """
    if len(keys) != 1:
        raise ValueError(f"exactly one transform key is expected, got {list(keys)}")
    if keys[0] in _REFUSED:
        raise ValueError(f"transform key {keys[0]!r} is refused: {_REFUSED[keys[0]]}")
    if keys[0] not in TRANSFORMS:
        raise ValueError(f"unknown transform key {keys[0]!r}; expected one of {', '.join(TRANSFORMS)}")
    return TRANSFORMS[keys[0]](size_dhw)
