"""Keys of the small runs on drawn data sets that segmentation benchmarks share; a folder adds its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["SHORT_SEGMENTATION"]

SHORT_SEGMENTATION: Mapping[str, Any] = MappingProxyType(
    {
        "roi": [64, 64, 32],
        "crops_per_volume": 2,
        "overlap": 0.25,
        "precision": 32,
        "gradient_checkpointing": False,
        "learning_rate": 2e-3,
        "learning_rate_crops": 0,
        "warmup_epochs": 0.0,
        "schedule_interval": "step",
        "max_epoch": 8,
        "val_every_epochs": 4,
        "cache": "memory",
    }
)
"""A from-scratch network of 12 features learns the drawings in some thirty steps."""
