"""Random streams of a sample: a function of (seed, epoch, dataset row, purpose) and of nothing else.

So a sample is the same for any number of workers and processes, and after a resume.
"""

from __future__ import annotations

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
