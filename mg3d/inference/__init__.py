"""From a scan and a name of weights to features, vectors and probabilities.

    from mg3d import encode_image, load_model, load_processor, zero_shot
    model, processor = load_model("weights/"), load_processor("weights/")
    vector = encode_image(model, processor, "chest.nii.gz")

Names are imported on first use: naming this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "MG3DModel": "mg3d.inference.model",
    "Processor": "mg3d.inference.processor",
    "encode_image": "mg3d.inference.one_scan",
    "encode_text": "mg3d.inference.one_scan",
    "load_model": "mg3d.inference.model",
    "load_processor": "mg3d.inference.processor",
    "zero_shot": "mg3d.inference.one_scan",
}

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
