"""The training objectives: one file each, found by the name used in ``loss_names``.

An objective is a small callable: shared features and batch in, a dictionary of named scalars out, among them
``"<name>_loss"``. Its trainable modules come from ``components`` and live on the network under published names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mg3d.errors import ConfigError
from mg3d.models.options import NetworkOptions

if TYPE_CHECKING:
    from mg3d.models.encoded_batch import EncodedBatch
    from mg3d.models.network import MG3DNetwork

OBJECTIVES: dict[str, tuple[str, str]] = {
    "sen_mlm": ("sentence_mlm", "SentenceMLM"),
    "swin_unetr_mim": ("masked_image", "MaskedImage"),
    "local_itc": ("local_contrast", "LocalContrast"),
    "itc": ("image_text_contrast", "ImageTextContrast"),
    "itm": ("image_text_matching", "ImageTextMatching"),
}
"""Name -> (file of this package, class)."""


class Objective(Protocol):
    """What every objective offers.

    Attributes:
        name: key in ``loss_names`` and first part of every logged name.
    """

    name: str

    def __init__(self, options: NetworkOptions) -> None: ...

    @staticmethod
    def components(options: NetworkOptions, image_width: int, text_width: int) -> dict[str, nn.Module]:
        """Modules that only this objective needs, by their name on the network.

        Args:
            options: sizes and switches.
            image_width: E of the vision encoder's tokens.
            text_width: E of the text encoder.
        """
        ...

    def __call__(self, net: MG3DNetwork, encoded: EncodedBatch, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the terms of one batch.

        Returns:
            Scalars: ``"<name>_loss"`` (the one to be weighted and summed), its parts, and for objectives with an
            accuracy ``"accuracy"`` with its number of cases ``"accuracy_count"``.
        """
        ...


def objective_class(name: str) -> type[Objective]:
    """Class of an objective.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(str(name), OBJECTIVES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown objective {name!r}", f"{hint}valid: {', '.join(OBJECTIVES)}")
    module, class_name = OBJECTIVES[name]
    return getattr(import_module(f"{__name__}.{module}"), class_name)


def create_objective(name: str, options: NetworkOptions) -> Objective:
    """Build an objective by name; raises as :func:`objective_class`."""
    return objective_class(name)(options)


def objective_components(name: str, options: NetworkOptions, image_width: int, text_width: int) -> dict[str, nn.Module]:
    """Modules of an objective, see :meth:`Objective.components`; raises as :func:`objective_class`."""
    return objective_class(name).components(options, image_width, text_width)


def weighted_total(terms: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]) -> Tensor:
    """Sum of every objective's loss times its weight (spec section 9).

    Args:
        terms: objective name -> its terms, as the network returns them.
        weights: objective name -> weight.
    """
    return torch.stack([weights[name] * found[f"{name}_loss"] for name, found in terms.items()]).sum()
