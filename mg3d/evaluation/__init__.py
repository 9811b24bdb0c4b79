"""What a pre-trained model knows: linear probe, retrieval, zero-shot, effective rank."""

from __future__ import annotations

from mg3d.evaluation.run import evaluate_run

__all__ = ["evaluate_run"]
