"""A prediction and the truth as contours on three planes through the lesion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from mg3d.finetuning.pictures.canvas import colour, new_figure, save

PLANES = ("axial", "coronal", "sagittal")
LPS_OF = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom of the picture
ZOOM_MARGIN_MM = 15.0
ZOOM_BELOW = 0.5  # a close view is added when the structures fill less than this part of a plane's side
BAR_MM = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class _View:
    """One plane ready to draw: rows from top to bottom, columns from left to right.

    Attributes:
        image: [h, w] grey values.
        truth: [h, w] labels.
        pred: [h, w] labels.
        height_mm: size of a pixel down.
        width_mm: size of a pixel across.
        box: rows and columns (top, bottom, left, right) around the structures; None without any.
        edges: letters at the left, right, top and bottom.
        title: plane and slice.
    """

    image: np.ndarray
    truth: np.ndarray
    pred: np.ndarray
    height_mm: float
    width_mm: float
    box: tuple[int, int, int, int] | None
    edges: str
    title: str


def best_median_worst(rows: Sequence[Mapping[str, Any]], metric: str = "dice") -> dict[str, str]:
    """Choose the cases worth a picture.

    Args:
        rows: rows of ``per_case.csv`` with ``id`` and the metric, one or several a case.
        metric: column; higher is better. A case's value is the mean of its finite ones; cases without are left out.

    Returns:
        ``{"best": id, "median": id, "worst": id}``, each case once: fewer entries for fewer than three cases.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        text = row.get(metric)
        value = float(text) if text not in (None, "") else math.nan
        if math.isfinite(value):
            values.setdefault(str(row["id"]), []).append(value)
    ordered = sorted(values, key=lambda case: (-sum(values[case]) / len(values[case]), case))
    if not ordered:
        return {}
    chosen = {"best": ordered[0], "worst": ordered[-1], "median": ordered[(len(ordered) - 1) // 2]}
    names: dict[str, str] = {}
    for role in ("best", "worst", "median"):
        if chosen[role] not in names.values():
            names[role] = chosen[role]
    return {role: names[role] for role in ("best", "median", "worst") if role in names}


def overlay_png(
    image: np.ndarray,
    truth: np.ndarray,
    pred: np.ndarray,
    spacing_mm: Sequence[float],
    classes: Sequence[str],
    path: Path,
    *,
    orientation: str = "RAS",
    title: str = "",
    window: tuple[float, float] | None = None,
) -> Path:
    """Draw the contours of truth (solid) and prediction (dashed) on an axial, a coronal and a sagittal slice.

    The slices go through the place where the structures show the largest area, each with square millimetres, seen as
    radiologists do: the patient's right on the left of the picture, front and head up. Small structures get a second
    row with a close view.

    Args:
        image: [X,Y,Z] intensities.
        truth: [X,Y,Z] labels, 0 background.
        pred: [X,Y,Z] labels.
        spacing_mm: voxel size along the three array axes.
        classes: names; label k + 1 is ``classes[k]``. Colours tell classes; a single class gets a colour for the truth
            and one for the prediction.
        path: PNG to write.
        orientation: direction in which each array axis rises, for example ``RAS`` or ``LPS``
            (``nibabel.aff2axcodes``); ``SPL`` for a (z, y, x) array of the project.
        title: line above the picture, for example the case and its Dice.
        window: grey values shown as black and white; None takes the 1st and 99th percentile.

    Returns:
        the path.

    Raises:
        ValueError: arrays that differ in shape or are not three-dimensional, or an impossible orientation.
    """
    if not image.shape == truth.shape == pred.shape or image.ndim != 3:
        raise ValueError(f"three [X,Y,Z] arrays of one shape are needed: {image.shape}, {truth.shape}, {pred.shape}")
    arrays, sizes = _to_lps((image, truth, pred), spacing_mm, orientation)
    views = _views(arrays, sizes)
    black, white = window or _window(image)
    near = any(_is_small(view) for view in views)
    figure = new_figure(11.5, 4.6 if not near else 8.2)
    panels = figure.subplots(2 if near else 1, 3, squeeze=False)
    for column, view in enumerate(views):
        _draw(panels[0][column], view, black, white, len(classes), frame=near)
        if near:
            _draw(panels[1][column], view, black, white, len(classes), close=True)
    _legend(figure, classes, arrays)
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def _to_lps(
    arrays: Sequence[np.ndarray], spacing_mm: Sequence[float], orientation: str
) -> tuple[list[np.ndarray], list[float]]:
    """Views of the arrays with axes that rise to the left, to the back and to the head, and their voxel sizes."""
    places = [LPS_OF.get(letter, (-1, 0)) for letter in orientation.upper()]
    if sorted(axis for axis, _ in places) != [0, 1, 2]:
        raise ValueError(f"orientation needs one letter of each pair LR, PA and SI, got {orientation!r}")
    order = [next(k for k, (axis, _) in enumerate(places) if axis == wanted) for wanted in range(3)]
    flips = tuple(slice(None, None, places[k][1]) for k in order)
    return [array.transpose(order)[flips] for array in arrays], [float(spacing_mm[k]) for k in order]


def _views(arrays: Sequence[np.ndarray], sizes: Sequence[float]) -> list[_View]:
    marked = (arrays[1] > 0) | (arrays[2] > 0)
    area = arrays[1] > 0 if (arrays[1] > 0).any() else marked
    views = []
    for plane, axis in zip(PLANES, (2, 1, 0), strict=True):
        rest = tuple(other for other in range(3) if other != axis)
        counts = area.sum(axis=rest)
        index = int(counts.argmax()) if counts.any() else area.shape[axis] // 2
        cuts = [_upright(array.take(index, axis=axis), plane) for array in (*arrays, marked)]
        across, down = rest
        views.append(
            _View(
                cuts[0],
                cuts[1],
                cuts[2],
                sizes[down],
                sizes[across],
                _around(cuts[3], sizes[down], sizes[across]),
                EDGES[plane],
                f"{plane}, slice {index + 1} of {area.shape[axis]}",
            )
        )
    return views


def _upright(plane_ab: np.ndarray, plane: str) -> np.ndarray:
    """Second axis down; the head goes up, so planes that hold it are turned over."""
    rows = plane_ab.T
    return rows if plane == "axial" else rows[::-1]


def _around(marked: np.ndarray, height_mm: float, width_mm: float) -> tuple[int, int, int, int] | None:
    found = ndimage.find_objects(marked.astype(np.uint8))
    if not found:
        return None
    rows, columns = found[0]
    down, across = ZOOM_MARGIN_MM / height_mm, ZOOM_MARGIN_MM / width_mm
    return (
        max(int(rows.start - down), 0),
        min(math.ceil(rows.stop + down), marked.shape[0]),
        max(int(columns.start - across), 0),
        min(math.ceil(columns.stop + across), marked.shape[1]),
    )


def _is_small(view: _View) -> bool:
    if view.box is None:
        return False
    top, bottom, left, right = view.box
    height, width = view.image.shape
    return max((bottom - top) / height, (right - left) / width) < ZOOM_BELOW


def _window(image: np.ndarray) -> tuple[float, float]:
    finite = image[np.isfinite(image)] if image.dtype.kind == "f" else image
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(finite, (1, 99)))
    return low, max(high, low + 1e-6)


def _draw(
    axes: Any, view: _View, black: float, white: float, classes: int, *, close: bool = False, frame: bool = False
) -> None:
    height, width = view.image.shape
    extent = (0.0, width * view.width_mm, height * view.height_mm, 0.0)
    axes.imshow(view.image, cmap="gray", vmin=black, vmax=white, extent=extent, interpolation="nearest")
    for k in range(classes):
        _contour(axes, view.truth == k + 1, view, colour(k), "solid")
        _contour(axes, view.pred == k + 1, view, _pred_colour(k, classes), "dashed")
    axes.set_xticks([])
    axes.set_yticks([])
    limits = (0.0, extent[1], extent[2], 0.0)
    if view.box is not None:
        top, bottom, left, right = view.box
        box = (left * view.width_mm, right * view.width_mm, bottom * view.height_mm, top * view.height_mm)
        if close:
            limits = box
        elif frame:
            axes.plot(
                [box[k] for k in (0, 1, 1, 0, 0)], [box[k] for k in (3, 3, 2, 2, 3)], color="white", linewidth=0.8
            )
    axes.set_xlim(limits[0], limits[1])
    axes.set_ylim(limits[2], limits[3])
    _letters(axes, view.edges)
    _bar(axes, limits)
    axes.set_title(f"{view.title}, close" if close else view.title, fontsize=9)


def _pred_colour(index: int, classes: int) -> str:
    """A colour of its own where there is but one class; otherwise the colours tell the classes."""
    return colour(1) if classes == 1 else colour(index)


def _contour(axes: Any, mask: np.ndarray, view: _View, shade: str, style: str) -> None:
    if not mask.any():
        return
    # one empty pixel around it closes contours at the border of the image
    padded = np.pad(mask.astype(np.float32), 1)
    across = (np.arange(padded.shape[1]) - 0.5) * view.width_mm
    down = (np.arange(padded.shape[0]) - 0.5) * view.height_mm
    axes.contour(across, down, padded, levels=[0.5], colors=[shade], linewidths=1.4, linestyles=style)


def _letters(axes: Any, edges: str) -> None:
    sides = ((0.01, 0.5, "left", "center"), (0.99, 0.5, "right", "center"))
    places = (*sides, (0.5, 0.99, "center", "top"), (0.5, 0.01, "center", "bottom"))
    for letter, (x, y, across, down) in zip(edges, places, strict=True):
        _words(axes, x, y, letter, transform=axes.transAxes, ha=across, va=down, fontsize=8)


def _bar(axes: Any, limits: tuple[float, float, float, float]) -> None:
    width, height = limits[1] - limits[0], limits[2] - limits[3]
    length = max((size for size in BAR_MM if size <= width / 3), default=BAR_MM[0])
    left, down = limits[0] + 0.04 * width, limits[3] + 0.95 * height
    axes.plot([left, left + length], [down, down], color="white", linewidth=2, solid_capstyle="butt")
    _words(axes, left, down - 0.015 * height, f"{length} mm", fontsize=7, va="bottom")


def _words(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """White with a dark rim: readable on air and on bone."""
    from matplotlib.patheffects import withStroke

    axes.text(x, y, text, color="white", path_effects=[withStroke(linewidth=2, foreground="black")], **style)


def _legend(figure: Any, classes: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    from matplotlib.lines import Line2D

    present = set(np.unique(arrays[1])) | set(np.unique(arrays[2]))
    shown = [(k, name) for k, name in enumerate(classes) if k + 1 in present]
    if len(classes) == 1:
        handles = [Line2D([], [], color=colour(0), label=f"{classes[0]}, truth")]
        handles.append(Line2D([], [], color=colour(1), linestyle="dashed", label=f"{classes[0]}, prediction"))
    else:
        handles = [Line2D([], [], color=colour(k), label=name) for k, name in shown]
        handles.append(Line2D([], [], color="0.4", label="truth"))
        handles.append(Line2D([], [], color="0.4", linestyle="dashed", label="prediction"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
