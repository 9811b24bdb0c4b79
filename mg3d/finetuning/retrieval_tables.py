"""The text files in which CT-CLIP's scripts leave both retrievals (spec downstream 7.8, 7.9).

n cases, P latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mg3d.atomic import write_text_atomically
from mg3d.metrics.label_retrieval import Protocol, map_at_k
from mg3d.metrics.retrieval import ranks_with_ties_last

__all__ = ["write_report_recall", "write_shared_findings"]

RANDOM_WIDTH = 512
"""Width of the published random baseline."""


def write_report_recall(folder: Path, similarity: np.ndarray, ks: Sequence[int], seed: int = 0) -> list[Path]:
    """Write ``internal_accessions_t2i_{K}.txt``: a line ``K=…, clip = …, rand= …`` in a file for each K.

    As published all reported volumes are the pool and a report's own volume is the only right answer; ``rand`` is the
    share for uniform random vectors.

    Args:
        folder: exists.
        similarity: [n, n] scores, row = report, own volume on the diagonal.
        ks: cut-offs; those that leave no volume out are skipped.
        seed: of the random vectors.

    Returns:
        The files.
    """
    cases = len(similarity)
    own = np.eye(cases, dtype=bool)
    texts, images = np.random.default_rng(seed).random((2, cases, RANDOM_WIDTH))
    found, drawn = ranks_with_ties_last(similarity, own), ranks_with_ties_last(texts @ images.T, own)
    paths = []
    for k in (k for k in ks if k < cases):
        paths.append(folder / f"internal_accessions_t2i_{k}.txt")
        shares = ((found <= k).mean(), (drawn <= k).mean())
        write_text_atomically(paths[-1], f"K={k}, clip = {shares[0]:.6f}, rand= {shares[1]:.6f}\n")
    return paths


def write_shared_findings(
    path: Path,
    latents: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int],
    *,
    protocol: Protocol,
    groups: Sequence[str] | None = None,
) -> bool:
    """Write ``i2i_real.txt``: MAP@K of volumes that ask for volumes, a number a line in the order of K.

    Args:
        path: the file.
        latents: [n, P].
        labels: [n, L], 1 present.
        ks: cut-offs.
        protocol: as in `mg3d.metrics.label_retrieval.map_at_k`, like ``groups``.
        groups: patient of each volume.

    Returns:
        Whether there was anything to ask; else no file is written.
    """
    try:
        found = map_at_k(latents, labels, ks, protocol=protocol, groups=groups)
    except ValueError:
        return False
    write_text_atomically(path, "".join(f"{value:.6f}\n" for value in found.values()))
    return True
