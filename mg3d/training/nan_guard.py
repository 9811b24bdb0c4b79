"""Stop before an optimizer step that would carry a NaN or an infinity into the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mg3d.errors import MG3DError, RunFailedError
from mg3d.training.checkpoint_io import save_file
from mg3d.training.step_window import StepWindow

log = logging.getLogger(__name__)

LISTED_PARAMETERS = 50
SMALLEST_LOSS_SCALE = 1.0


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """Euclidean norm over all gradients; NaN or infinite as soon as one entry is."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    return float(torch.nn.utils.get_total_norm(gradients, norm_type=2.0))


def diagnose(loss: float, grad_norm: float, scaler: Any) -> str:
    """Name what is wrong with a step, or "".

    Args:
        loss: mean total loss of the step.
        grad_norm: norm of the (unscaled) gradients.
        scaler: loss scaler of fp16 training, or None. Its own skips are let through while the scale can still fall.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if math.isfinite(grad_norm):
        return ""
    if scaler is not None and scaler.is_enabled() and scaler.get_scale() > SMALLEST_LOSS_SCALE:
        return ""
    return f"the gradient norm is {grad_norm}"


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Make the coming step of the optimizer touch nothing: parameters without a gradient are passed over."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def spoiled_buffers(module: torch.nn.Module) -> list[str]:
    """Names of floating buffers (running statistics, queues) that hold a non-finite value."""
    return [
        name for name, buffer in module.named_buffers() if buffer.is_floating_point() and not buffer.isfinite().all()
    ]


def offending_gradients(module: torch.nn.Module) -> dict[str, float]:
    """Gradient norms of the parameters whose gradient is not finite, at most 50 of them."""
    held = ((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)
    norms = {name: float(torch.linalg.vector_norm(grad)) for name, grad in held}
    bad = {name: norm for name, norm in norms.items() if not math.isfinite(norm)}
    return dict(list(bad.items())[:LISTED_PARAMETERS])


def _tensors(batch: Any) -> dict[str, Tensor]:
    """Tensors of a batch on the CPU; report texts stay out of the file."""
    if isinstance(batch, (list, tuple)):
        batch = {str(index): value for index, value in enumerate(batch)}
    if not isinstance(batch, Mapping):
        batch = {"0": batch}
    return {key: value.detach().cpu() for key, value in batch.items() if isinstance(value, Tensor)}


def capture_file(run_dir: Path, step: int, rank: int) -> Path:
    """Name of the capture of one failed step; ranks other than 0 add their number."""
    return run_dir / (f"nonfinite_step{step}.pt" if rank == 0 else f"nonfinite_step{step}_rank{rank}.pt")


def write_capture(
    path: Path, module: torch.nn.Module, window: StepWindow, reason: str, terms: Mapping[str, float], step: int
) -> None:
    """Write all that replays the failed step: rows, batch tensors, random state, weights, terms, bad gradients.

    Weights, memories and running statistics are those before the step. Ids and tensors only, no report text. A full
    disk is reported and does not hide the failure itself.
    """
    content = {
        "reason": reason,
        "step": step,
        **window.row_names(),
        "batches": [_tensors(batch) for batch in window.batches],
        "losses": [float(loss) for loss in window.losses],
        "terms": dict(terms),
        "grad_norm": window.grad_norm,
        "gradients": offending_gradients(module),
        "rng": window.rng,
        "state_dict": {name: value.detach().cpu() for name, value in {**module.state_dict(), **window.buffers}.items()},
    }
    try:
        save_file(content, path, f"# mg3d step={step} epoch=-1 kind=capture")
        log.error("step %d: %s; rows, random state and weights are in %s", step, reason, path)
    except MG3DError as error:
        log.error("step %d: %s; the capture could not be written: %s", step, reason, error)


def failure(step: int, reason: str, rows: Mapping[str, list[Any]], path: Path) -> RunFailedError:
    """Error that ends the run at a non-finite step, naming the studies and the capture."""
    studies = ", ".join(rows["image_id"][:4]) or ", ".join(map(str, rows["index"][:4])) or "unknown"
    return RunFailedError(
        f"optimizer step {step} was not taken: {reason} (studies {studies}; capture {path})",
        "lower learning_rate, set grad_clip or precision=bf16, or allow a few with max_bad_steps",
    )
