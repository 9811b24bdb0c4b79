"""What all pictures share: figures without a display or global state, colours that colour-blind readers can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mg3d.atomic import atomic_path

DPI = 110
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#999999")


def colour(index: int) -> str:
    """Colour of a class or curve by its number; they repeat after eight."""
    return COLOURS[index % len(COLOURS)]


def new_figure(width: float, height: float, **style: Any) -> Any:
    """Return an empty matplotlib figure that belongs to no window and no global list.

    Args:
        width: inches.
        height: inches.
        style: further arguments of ``matplotlib.figure.Figure``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", **style)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> Path:
    """Write the figure as PNG, whole or not at all.

    Args:
        figure: of :func:`new_figure`.
        path: file to write; its folder is made when it is missing.

    Returns:
        the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png", metadata={"Software": None})
    return path
