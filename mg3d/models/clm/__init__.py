"""Writing reports with a causal decoder over the image tokens of the pre-trained module."""

from __future__ import annotations

from mg3d.models.clm.head import CausalReportHead, GenerationOptions
from mg3d.models.clm.module import ReportWritingModule

__all__ = ["CausalReportHead", "GenerationOptions", "ReportWritingModule"]
