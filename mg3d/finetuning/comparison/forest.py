"""The forest plot of a comparison: figures on the left, differences to scratch on the right, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d.atomic import atomic_path

if TYPE_CHECKING:
    from mg3d.finetuning.comparison.table import Line

__all__ = ["draw_forest"]

BASE_COLOUR, OTHER_COLOUR = "#8a8a8a", "#1f5fa8"


def draw_forest(lines: Sequence[Line], path: Path) -> Path:
    """Draw one row a line of the table; lines without a finished run say so.

    Args:
        lines: of the table.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(10, 1.4 + 0.36 * max(len(lines), 1)), sharey=True, layout="constrained"
    )
    labels = [f"{line.benchmark}, {line.encoder}: {line.weights}" for line in lines]
    for place, line in enumerate(lines):
        colour = BASE_COLOUR if line.weights == "scratch" else OTHER_COLOUR
        _interval(axes[0], place, line.mean, line.low, line.high, colour)
        _interval(axes[1], place, line.difference, line.difference_low, line.difference_high, colour)
        if not line.runs:
            axes[0].annotate("no finished run", (0.02, place), xycoords=("axes fraction", "data"), va="center")
    axes[1].axvline(0, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(lines)), [f"{text} ({line.metric})" for text, line in zip(labels, lines, strict=True)])
    axes[0].set_ylim(len(lines) - 0.5, -0.5)
    axes[0].set_xlabel("figure, 95 % interval over patients")
    axes[1].set_xlabel("difference to scratch, same patients")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)
    return path


def _interval(axis: Any, place: int, value: float | None, low: float | None, high: float | None, colour: str) -> None:
    if value is None:
        return
    if low is not None and high is not None:
        axis.plot([low, high], [place, place], color=colour, linewidth=2)
    axis.plot([value], [place], marker="s", color=colour, markersize=6)
