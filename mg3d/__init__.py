"""MG-3D: multi-grained knowledge-enhanced vision-language pre-training for 3D medical image analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mg3d.inference.model import load_model
    from mg3d.inference.one_scan import encode_image, encode_text, zero_shot
    from mg3d.inference.processor import load_processor

__version__ = "0.1.0"
__all__ = ["__version__", "encode_image", "encode_text", "load_model", "load_processor", "zero_shot"]


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that ``import mg3d`` loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mg3d import inference

    return getattr(inference, name)
