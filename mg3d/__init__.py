"""MG-3D: multi-grained knowledge-enhanced vision-language pre-training for 3D medical image analysis."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
