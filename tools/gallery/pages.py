"""From studies and counts to HTML: everything a page shows, filled into the templates (which escape all text)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mg3d.scans.slices import PLANES, Plane, Window, frame_positions, frame_size, scale_bar_mm
from prepro.text import split_sentences
from prepro.tokens import TokenCounter
from tools.gallery import charts
from tools.gallery.items import Study, Voxels
from tools.gallery.statistics import VoxelSummary, edges

TEMPLATES: Final = Path(__file__).parent / "templates"
ASSETS: Final = ("gallery.css", "gallery.js")
STATES: Final = {1: ("present", "+"), 0: ("absent", "\u2212"), -1: ("unknown", "?")}
_VIEWS: Final = {"axial": "seen from the feet", "coronal": "seen from the front", "sagittal": "seen from the left"}
_ORIGINS: Final = {"axial": "from the lowest", "coronal": "from the foremost", "sagittal": "from the rightmost"}


@dataclass(frozen=True)
class Card:
    """What the index shows of a drawn study.

    Attributes:
        study: its text and labels.
        page: path of its page, relative to the index.
        thumbnail: path of its picture; empty when it could not be read.
        reason: why it could not be read.
        warned: whether its page holds warnings.
    """

    study: Study
    page: str
    thumbnail: str = ""
    reason: str = ""
    warned: bool = False


@dataclass(frozen=True)
class Pane:
    """One plane of the viewer: which slices its strip holds, and how large they are."""

    plane: Plane
    positions: list[int]
    size_px: tuple[int, int]
    width_mm: float
    size: int
    step_mm: float


@dataclass(frozen=True)
class StudyView:
    """The drawn part of a study page."""

    voxels: Voxels
    summary: VoxelSummary
    panes: tuple[Pane, ...]
    windows: tuple[Window, ...]
    shown: Window
    folder: str
    warnings: list[str] = field(default_factory=list)


def plan_panes(shape: Sequence[int], spacing_mm: Sequence[float], step_mm: float) -> tuple[Pane, ...]:
    """Choose the slices and the frame size of the three planes, all at one scale."""
    extents = [size * step for size, step in zip(shape, spacing_mm, strict=True)]
    panes = []
    for plane in PLANES:
        size_px = frame_size(plane, extents, step_mm)
        positions = frame_positions(shape[plane.axis], size_px[0] * size_px[1])
        panes.append(
            Pane(plane, positions, size_px, extents[plane.columns], shape[plane.axis], float(spacing_mm[plane.axis]))
        )
    return tuple(panes)


class Pages:
    """Fills the templates and writes the pages of one gallery.

    Args:
        out: folder of the gallery.
        name: name of the data set.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.out = out
        self.name = name
        loader = FileSystemLoader(TEMPLATES)
        self._templates = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.filters["number"] = charts.number
        (out / "assets").mkdir(parents=True)
        for asset in ASSETS:
            shutil.copyfile(TEMPLATES / asset, out / "assets" / asset)

    def write_study(
        self,
        card: Card,
        view: StudyView | None,
        neighbours: tuple[str, str],
        counter: TokenCounter,
    ) -> None:
        """Write the page of one study.

        Args:
            card: what is known of it.
            view: its pictures; None when it could not be read.
            neighbours: pages before and after it, relative to the index, empty at the ends.
            counter: counts the tokens of the report.
        """
        study = card.study
        values = {
            "top": "../",
            "name": self.name,
            "study": study,
            "reason": card.reason,
            "previous": neighbours[0],
            "next": neighbours[1],
            "sentences": report_sentences(study),
            "fragments": (*study.findings_sen, *study.impression_sen),
            "tokens": token_words(study, counter),
            "labels": [(name, *STATES[value]) for name, value in zip(study.label_names, study.labels, strict=True)],
            **_view_values(view),
        }
        self._write("study.html", self.out / card.page, values)

    def write_index(self, values: Mapping[str, Any], cards: Sequence[Card]) -> None:
        """Write the data-set page.

        Args:
            values: what :mod:`tools.gallery.overview` prepared.
            cards: the drawn studies, in order.
        """
        shown = [
            {
                "page": card.page,
                "thumbnail": card.thumbnail,
                "image_id": card.study.image_id,
                "corpus": card.study.corpus,
                "split": card.study.split,
                "bad": bool(card.reason),
                "warned": card.warned,
                "present": _named_labels(card.study, 1),
            }
            for card in cards
        ]
        data = {"top": "", "name": self.name, "cards": shown, "data": embed_json([_record(card) for card in cards])}
        self._write("index.html", self.out / "index.html", {**data, **values})

    def _write(self, template: str, path: Path, values: Mapping[str, Any]) -> None:
        html = self._templates.get_template(template).render(values)
        path.write_text(html, encoding="utf-8", errors="replace")


def report_sentences(study: Study) -> list[tuple[str, str, list[str]]]:
    """Section, sentence, and the comma fragments within it, in the order of the report."""
    rows = []
    sections = (("F", study.findings, study.findings_sen), ("I", study.impression, study.impression_sen))
    for section, text, fragments in sections:
        left = list(fragments)
        for sentence in split_sentences(text):
            parts: list[str] = []
            length = 0
            while left and length + len(left[0].strip()) <= len(sentence.strip()) + 1:
                length += len(left[0])
                parts.append(left.pop(0).strip())
            rows.append((section, sentence, parts or [sentence.strip()]))
        rows += [(section, fragment, [fragment.strip()]) for fragment in left]
    return rows


def token_words(study: Study, counter: TokenCounter) -> str:
    """How long the report is, in words for a reader."""
    count = counter.count((*study.findings_sen, *study.impression_sen))[0]
    return f"{count} tokens" if counter.exact else f"at least {count} tokens"


def embed_json(value: Any) -> Markup:
    """JSON that is safe inside a script element: no ``<``, ``>`` or ``&`` survives unescaped."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _record(card: Card) -> dict[str, Any]:
    study = card.study
    text = " ".join((study.image_id, study.patient_id, study.findings, study.impression))
    return {
        "id": study.image_id,
        "corpus": study.corpus,
        "split": study.split,
        "labels": dict(zip(study.label_names, study.labels, strict=True)),
        "text": " ".join(text.lower().split()),
        "bad": bool(card.reason),
        "warned": card.warned,
    }


def _named_labels(study: Study, state: int) -> list[str]:
    return [name for name, value in zip(study.label_names, study.labels, strict=True) if value == state]


def _view_values(view: StudyView | None) -> dict[str, Any]:
    if view is None:
        empty: dict[str, Any] = dict.fromkeys(("panes", "geometry", "checks", "warnings", "windows"), ())
        return empty | {"window": None, "unit": "", "folder": "", "histogram": "", "assumed": False}
    return {
        "panes": [pane_values(pane, scale_bar_mm(min(item.width_mm for item in view.panes))) for pane in view.panes],
        "windows": view.windows,
        "window": view.shown,
        "unit": view.voxels.unit,
        "folder": view.folder,
        "assumed": view.voxels.assumed_spacing,
        "warnings": view.warnings,
        "checks": [view.voxels.checked],
        "geometry": geometry_rows(view.voxels, view.summary, view.panes),
        "histogram": intensity_chart(view.summary, view.shown),
    }


def pane_values(pane: Pane, bar_mm: int) -> dict[str, Any]:
    """What the template ``pane.html`` shows of one plane.

    Args:
        pane: from :func:`plan_panes`.
        bar_mm: length of the scale bar, the same in all panes.
    """
    middle = pane.positions.index(min(pane.positions, key=lambda place: abs(place - pane.size // 2)))
    place = pane.positions[middle]
    origin = _ORIGINS[pane.plane.name]
    return {
        "name": pane.plane.name,
        "view": _VIEWS[pane.plane.name],
        "positions": pane.positions,
        "size": pane.size,
        "step_mm": pane.step_mm,
        "origin": origin,
        "start": middle,
        "caption": f"{place + 1} of {pane.size}, {round(place * pane.step_mm)} mm {origin}",
        "width_px": pane.size_px[0],
        "height_px": pane.size_px[1],
        "width_mm": pane.width_mm,
        "letters": list(zip(("top", "right", "bottom", "left"), pane.plane.letters, strict=True)),
        "bar_mm": bar_mm,
        "bar_percent": 100 * bar_mm / pane.width_mm,
    }


def geometry_rows(voxels: Voxels, summary: VoxelSummary, panes: Sequence[Pane]) -> list[tuple[str, str]]:
    """The geometry table: name and value, with units."""
    shape = voxels.array.shape
    extents = [size * step for size, step in zip(shape, voxels.spacing_mm, strict=True)]
    low, middle, high = summary.percentiles
    unit = f" {summary.unit}" if summary.unit == "HU" else ""
    rows = [
        ("voxels (z, y, x)", _times(shape)),
        ("spacing (z, y, x)", f"{_times(voxels.spacing_mm)} mm"),
        ("extent (z, y, x)", f"{_times([round(value) for value in extents])} mm"),
        ("index directions", "z to superior, y to posterior, x to the patient's left"),
        ("type, memory", f"{voxels.array.dtype}, {voxels.array.nbytes / 2**20:.1f} MiB"),
        ("smallest, largest", f"{charts.number(summary.low)}, {charts.number(summary.high)}{unit}"),
        ("1 %, median, 99 %", ", ".join(charts.number(value) for value in (low, middle, high)) + unit),
        ("mean", f"{charts.number(round(summary.mean, 1))}{unit}"),
        ("slices drawn", ", ".join(f"{pane.plane.name} {len(pane.positions)} of {pane.size}" for pane in panes)),
    ]
    return rows + [(key, _plain(value)) for key, value in voxels.facts.items() if value != ""]


def intensity_chart(summary: VoxelSummary, shown: Window) -> Markup:
    """Histogram of one volume with the shown window marked."""
    shares = 100.0 * summary.counts / max(float(np.sum(summary.counts)), 1.0)
    band = None if shown.key in ("full", "grey") else (shown.low, shown.high, f"shaded: {shown.key} window")
    label = "HU" if summary.unit == "HU" else "grey level"
    bins = "20 HU a bar; beyond \u00b11000 in the outer bars" if summary.unit == "HU" else "4 levels a bar"
    return charts.histogram(
        edges(summary.unit),
        shares,
        title="Intensities of the volume",
        x_label=f"{label} ({bins})",
        y_label="% of voxels",
        band=band,
        cap=True,
    )


def _times(values: Sequence[float]) -> str:
    return " \u00d7 ".join(f"{value:.4g}" for value in values)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return _times(value) if all(isinstance(part, (int, float)) for part in value) else ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("_", " ")
