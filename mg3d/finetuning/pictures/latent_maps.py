"""Latents of volumes on a plane (t-SNE or UMAP), one picture of every finding (spec downstream 7.10).

n volumes, P latent width, L findings.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mg3d.atomic import atomic_path
from mg3d.errors import ConfigError, EnvironmentProblem

__all__ = ["METHODS", "check_maps", "draw_latent_maps", "plane"]

log = logging.getLogger(__name__)

METHODS = {"tsne": "maps", "umap": "maps_umap"}
"""Method -> folder of its pictures."""

PERPLEXITY, ITERATIONS, SEED = 30, 300, 1231
FEWEST = PERPLEXITY + 1
PRESENT, OTHERS = "#ff0066", "black"
DPI, PUBLISHED_DPI = 150, 600


def check_maps(methods: Sequence[str]) -> None:
    """Refuse methods that cannot be used here, before anything is computed.

    Raises:
        ConfigError: an unknown method.
        EnvironmentProblem: UMAP is not installed.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"maps: {method!r} is no method", f"choose from {', '.join(METHODS)}")
    if "umap" in methods and importlib.util.find_spec("umap") is None:
        raise EnvironmentProblem("maps=umap: UMAP is not installed", "pip install umap-learn, or write maps=[tsne]")


def plane(latents: np.ndarray, method: str = "tsne") -> np.ndarray:
    """Places [n, 2] of latents [n, P].

    Args:
        latents: n rows.
        method: "tsne" as published, or "umap" (needs umap-learn) with its defaults.

    Raises:
        ValueError: fewer volumes than neighbours.
        ConfigError: an unknown method.
        EnvironmentProblem: UMAP is not installed; t-SNE never takes its place.
    """
    check_maps([method])
    if len(latents) < FEWEST:
        raise ValueError(f"a map needs {FEWEST} volumes, got {len(latents)}")
    if method == "umap":
        from umap import UMAP

        return np.asarray(UMAP(n_components=2, random_state=SEED).fit_transform(latents))
    from sklearn.manifold import TSNE

    found = TSNE(2, perplexity=PERPLEXITY, max_iter=ITERATIONS, random_state=SEED).fit_transform(latents)
    return np.asarray(found)


def draw_latent_maps(
    run_dir: Path, latents: np.ndarray, labels: np.ndarray, names: Sequence[str], method: str = "tsne", dpi: int = DPI
) -> list[Path]:
    """Draw ``maps/<finding>.png`` (t-SNE) or ``maps_umap/<finding>.png``.

    Args:
        run_dir: the run.
        latents: [n, P].
        labels: [n, L], 1 where a finding is present.
        names: L findings.
        method: "tsne" or "umap".
        dpi: points an inch.

    Returns:
        The pictures; none, with a notice, of fewer than 31 volumes.
    """
    if len(latents) < FEWEST:
        log.warning("no maps of latents: %d volumes, %d are needed", len(latents), FEWEST)
        return []
    from matplotlib.figure import Figure

    places = plane(latents, method)
    folder = run_dir / METHODS[method]
    folder.mkdir(exist_ok=True)
    paths = []
    for name, column in zip(names, labels.T, strict=True):
        present = column == 1
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        for chosen, colour, label in ((~present, OTHERS, "Others"), (present, PRESENT, name)):
            axes.scatter(
                places[chosen, 0], places[chosen, 1], s=8, color=colour, label=f"{label} ({int(chosen.sum())})"
            )
        axes.set_axis_off()
        axes.legend(loc="upper right")
        paths.append(folder / f"{name}.png")
        with atomic_path(paths[-1]) as partial:
            figure.savefig(partial, dpi=dpi, format="png")
    return paths
