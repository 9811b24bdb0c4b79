"""Image encoders: one file per family, built by name through the registry."""

from __future__ import annotations

from mg3d.models.vision_encoders.base import VisionEncoder
from mg3d.models.vision_encoders.registry import VISION_ENCODERS, create_vision_encoder, encoder_from_metadata

__all__ = ["VISION_ENCODERS", "VisionEncoder", "create_vision_encoder", "encoder_from_metadata"]
