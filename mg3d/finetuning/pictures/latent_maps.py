"""Latents of volumes on a plane (t-SNE), one picture of every finding (spec downstream 7.10).

n volumes, P latent width, L findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_latent_maps", "plane"]

PERPLEXITY, ITERATIONS, SEED = 30, 300, 1231
FEWEST = PERPLEXITY + 1
PRESENT, OTHERS = "#ff0066", "black"
DPI = 150


def plane(latents: np.ndarray) -> np.ndarray:
    """Places [n, 2] of latents [n, P].

    Raises:
        ValueError: fewer volumes than neighbours.
    """
    from sklearn.manifold import TSNE

    if len(latents) < FEWEST:
        raise ValueError(f"a map needs {FEWEST} volumes, got {len(latents)}")
    found = TSNE(2, perplexity=PERPLEXITY, max_iter=ITERATIONS, random_state=SEED).fit_transform(latents)
    return np.asarray(found)


def draw_latent_maps(run_dir: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Path]:
    """Draw ``maps/<finding>.png`` from ``predictions/image_latents.npz`` of a run, where it is there.

    Args:
        run_dir: the run.
        rows: of ``per_case.csv``, in the order of the latents; ``target_<name>`` is 1 where the finding is present.
        names: L findings.

    Returns:
        The pictures; none with fewer than 31 volumes.
    """
    file = run_dir / "predictions" / "image_latents.npz"
    if not file.is_file() or len(rows) < FEWEST or not names:
        return []
    from matplotlib.figure import Figure

    with np.load(file) as stored:
        places = plane(stored["data"].reshape(len(rows), -1))
    folder = run_dir / "maps"
    folder.mkdir(exist_ok=True)
    paths = []
    for name in names:
        present = np.asarray([row[f"target_{name}"] == 1 for row in rows])
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        for chosen, colour, label in ((~present, OTHERS, "Others"), (present, PRESENT, name)):
            axes.scatter(
                places[chosen, 0], places[chosen, 1], s=8, color=colour, label=f"{label} ({int(chosen.sum())})"
            )
        axes.set_axis_off()
        axes.legend(loc="upper right")
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths
