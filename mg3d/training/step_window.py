"""What is known of the micro-batches that make up one optimizer step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from mg3d.training import rng_state


def batch_rows(batch: Any) -> int:
    """Studies in a batch: the length of ``index`` or ``image_id``, else of the first tensor; 0 when unknown."""
    if isinstance(batch, Mapping):
        for key in ("index", "image_id"):
            if key in batch:
                return len(batch[key])
        return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
    if isinstance(batch, (list, tuple)):
        return batch_rows({"0": batch[0]}) if batch else 0
    return len(batch) if isinstance(batch, Tensor) and batch.ndim else 0


def whole_loss(trainer: pl.Trainer, loss: Tensor) -> Tensor:
    """Loss of a micro-batch as the module returned it.

    Before the backward pass the trainer has divided it by the accumulation count and, in fp16, multiplied it by the
    loss scale.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
    return loss.detach().float() * (trainer.accumulate_grad_batches / scale)


def stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what a forward pass in training changes beside the weights: memories of keys, running statistics."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer.detach().clone()
        for prefix, child in module.named_modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and name not in child._non_persistent_buffers_set
    }


@dataclass
class StepWindow:
    """Batches, losses and terms since the last optimizer step; random state and buffers before the first of them."""

    batches: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    rng: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    skipped: str = ""
    started: float = field(default_factory=time.perf_counter)

    def add_batch(self, batch: Any, module: nn.Module) -> None:
        """Remember a batch by reference; the first one of the window also fixes random state and stored buffers."""
        if not self.batches:
            self.rng = rng_state.capture()
            self.buffers = stored_buffers(module)
        self.batches.append(batch)

    def add_outputs(self, outputs: Any) -> None:
        """Keep the scalar terms that the training step returned beside its loss."""
        if isinstance(outputs, Mapping):
            scalars = {str(key): value for key, value in outputs.items() if key != "loss" and _is_scalar(value)}
            stacked = [torch.as_tensor(value).detach().double().reshape(()) for value in scalars.values()]
            values = torch.stack(stacked).tolist() if stacked else []  # one wait for the device, not one a term
            self.terms.append(dict(zip(scalars, values, strict=True)))

    def loss(self) -> float:
        """Mean total loss of the micro-batches (nan before the first)."""
        return float(torch.stack(self.losses).mean()) if self.losses else float("nan")

    def mean_terms(self) -> dict[str, float]:
        """Mean of every term over the micro-batches, in sorted order."""
        keys = sorted({key for terms in self.terms for key in terms})
        held = {key: [terms[key] for terms in self.terms if key in terms] for key in keys}
        return {key: sum(values) / len(values) for key, values in held.items()}

    def rows(self) -> int:
        """Studies of the window on this rank."""
        return sum(map(batch_rows, self.batches))

    def row_names(self) -> dict[str, list[Any]]:
        """``image_id`` and dataset row ``index`` of every study of the window, where the batches carry them."""
        named = [batch for batch in self.batches if isinstance(batch, Mapping)]
        return {
            "image_id": [str(name) for batch in named for name in batch.get("image_id", [])],
            "index": [int(row) for batch in named for row in batch.get("index", [])],
        }


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)
