"""Values of the shared keys that several segmentation benchmarks take; a folder adds its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["LESIONS_IN_CT", "SHORT_SEGMENTATION"]

SHORT_SEGMENTATION: Mapping[str, Any] = MappingProxyType(
    {
        "roi": [64, 64, 32],
        "crops_per_volume": 2,
        "overlap": 0.25,
        "precision": 32,
        "gradient_checkpointing": False,
        "learning_rate": 5e-3,
        "learning_rate_crops": 0,
        "warmup_epochs": 0.0,
        "schedule_interval": "step",
        "max_epoch": 8,
        "val_every_epochs": 4,
        "cache": "memory",
    }
)
"""A from-scratch network of 12 features learns the drawings in some thirty steps."""

LESIONS_IN_CT: Mapping[str, Any] = MappingProxyType(
    {
        "seed": 47,
        "learning_rate": 2e-4,
        "learning_rate_crops": 16,
        "max_epoch": 1000,
        "warmup_epochs": 50.0,
        "schedule_interval": "epoch",
        "grad_clip": 5.0,
        "precision": 16,
        "val_every_epochs": 5,
        "cache": "disk",
    }
)
"""The published training of the benchmarks on lesions in CT (downstream 2 and 3)."""
