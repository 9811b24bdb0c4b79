"""Random streams of a sample: a function of (seed, epoch, dataset row, purpose) and of nothing else.

So a sample is the same for any number of workers and processes, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np

PURPOSES: Final = ("sentences", "words", "cells", "transform", "false_image", "replacement", "order", "subset")


def sample_seed(seed: int, epoch: int, row: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose of one sample.

    Args:
        seed: seed of the run.
        epoch: epoch number, from 0.
        row: row in the (concatenated) dataset.
        purpose: one of :data:`PURPOSES`; different purposes draw independent numbers.

    Raises:
        ValueError: unknown purpose.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}; expected one of {', '.join(PURPOSES)}")
    entropy = [seed % 2**64, epoch, row, PURPOSES.index(purpose)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_generator(seed: int, epoch: int, row: int, purpose: str) -> np.random.Generator:
    """Return a numpy generator for one purpose of one sample (arguments as :func:`sample_seed`)."""
    return np.random.Generator(np.random.PCG64(sample_seed(seed, epoch, row, purpose)))


def draw_patients(patients: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Draw a share of patients that depends on the seed and the names only, not on order or library versions.

    Args:
        patients: patient ids, repeats allowed.
        fraction: share to draw; at least one patient as soon as there are two.
        seed: seed of the draw.

    Returns:
        the drawn ids.
    """
    ranked = sorted(set(patients), key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
    count = max(1, round(fraction * len(ranked))) if fraction > 0 and len(ranked) > 1 else 0
    return set(ranked[:count])
