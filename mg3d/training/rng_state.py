"""Random-number state of one process as tensors and plain numbers, so that a safe checkpoint can hold it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """State of the generators of python, numpy and torch (CPU, and every CUDA device in use)."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": [int(key) for key in keys],
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what :func:`capture` returned; CUDA states are applied as far as there are devices."""
    saved = state["python"]
    random.setstate((saved["version"], tuple(saved["internal"]), saved["gauss"]))
    numpy_state = state["numpy"]
    keys = np.asarray(numpy_state["keys"], dtype=np.uint32)
    np.random.set_state(
        (numpy_state["kind"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for index, device_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state.cpu(), index)


def gather() -> list[dict[str, Any]]:
    """States of all ranks in rank order, on every rank (a list of one without a process group)."""
    own = capture()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, own)
    return states


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the generators as they were, whatever happens inside."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
