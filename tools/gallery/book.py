"""Draw a whole gallery: one pass over all rows for the counts, then the pictures and page of each chosen study."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL.Image import Image
from tqdm import tqdm

from mg3d.atomic import atomic_folder, writing
from mg3d.errors import DataError, MG3DError, OutputError
from mg3d.locks import exclusive_output
from mg3d.scans.slices import (
    FULL_WINDOW,
    GREY_WINDOW,
    HU_WINDOWS,
    SHOWN_WINDOWS,
    Window,
    draw_overview,
    draw_strip,
    draw_thumbnail,
    full_window,
    pixel_mm,
)
from prepro.tokens import TokenCounter
from tools.gallery.facts import gather
from tools.gallery.items import Problem, Source, Study, Ticket, Voxels, choose
from tools.gallery.overview import index_values
from tools.gallery.pages import Card, Pages, StudyView, plan_panes
from tools.gallery.statistics import DatasetStatistics, summarise

MARKER: Final = "gallery.json"
# run lengths alone: a quarter of the time of the default, and smaller for pictures with noise
PNG: Final[dict[str, Any]] = {"compress_level": 6, "compress_type": zlib.Z_RLE}
UNREADABLE: Final = (MG3DError, OSError, ValueError, ArithmeticError, LookupError, MemoryError, TypeError)


@dataclass(frozen=True)
class BookOptions:
    """How a gallery is made.

    Attributes:
        out: folder to write; an older gallery there is replaced.
        name: name of the data set on the pages.
        limit: studies to draw, 0 for all.
        seed: seed of the draw.
        ids: studies to draw instead.
        window: the window shown first for HU volumes.
    """

    out: Path
    name: str
    limit: int = 60
    seed: int = 0
    ids: tuple[str, ...] = ()
    window: Window = HU_WINDOWS["lung"]


@dataclass(frozen=True)
class Summary:
    """What was made: studies in the data set, drawn, unreadable among them and the rows, pages, bytes."""

    studies: int
    drawn: int
    bad: int
    pages: int
    bytes: int


def draw_book(source: Source, options: BookOptions, counter: TokenCounter) -> Summary:
    """Write the gallery of a data set; the folder appears when everything is drawn.

    Args:
        source: the data set.
        options: how to draw.
        counter: counts the tokens of reports.

    Returns:
        what was made.

    Raises:
        DataError: an id is unknown, nothing is readable, or the folder holds something else.
        EnvironmentProblem: another process writes the folder.
        OutputError: the disk is full or read-only; an older gallery stays as it was.
    """
    with exclusive_output(options.out):
        refuse_foreign_folder(options.out)
        statistics, tickets = _scan(source, counter)
        chosen = choose(tickets, options.limit, options.seed, options.ids)
        with atomic_folder(options.out) as staging:
            pages = Pages(staging, options.name)
            cards = _draw_studies(source, chosen, options, pages, statistics)
            return _finish(source, cards, pages, statistics)


def refuse_foreign_folder(out: Path) -> None:
    """Raise DataError when ``out`` exists and is neither empty nor an older gallery."""
    if out.is_dir() and (not any(out.iterdir()) or (out / MARKER).is_file()):
        return
    if out.exists():
        raise DataError("exists and is no gallery", "name an empty or new folder as --out", path=str(out))


def _scan(source: Source, counter: TokenCounter) -> tuple[DatasetStatistics, list[Ticket]]:
    statistics, tickets = DatasetStatistics(counter), []
    for entry in tqdm(source.scan(), total=len(source), desc="reading text", unit="row", dynamic_ncols=True):
        statistics.add(entry)
        if not isinstance(entry, Problem):
            tickets.append(Ticket(entry.number, entry.image_id, entry.corpus, entry.split))
    if not tickets:
        problem = statistics.problems[0]
        raise DataError(f"no row can be read; the first: {problem.reason}", "pack the data again", path=problem.where)
    return statistics, tickets


def _draw_studies(
    source: Source, chosen: Sequence[Ticket], options: BookOptions, pages: Pages, statistics: DatasetStatistics
) -> list[Card]:
    (pages.out / "studies").mkdir()
    names = [f"studies/{ticket.number:05d}-{slug(ticket.image_id)}" for ticket in chosen]
    cards = []
    with tqdm(chosen, desc="drawing", unit="study", dynamic_ncols=True) as bar:
        for place, ticket in enumerate(bar):
            before = f"{names[place - 1]}.html" if place else ""
            after = f"{names[place + 1]}.html" if place + 1 < len(names) else ""
            card, view = _draw_study(source, ticket, names[place], options.window, pages.out)
            pages.write_study(card, view, (before, after), statistics.counter)
            if view is not None:
                part = statistics.corpora[ticket.corpus]
                part.volumes.append(view.summary)
                if card.study.shape is None:
                    part.add_geometry(view.voxels.array.shape, view.voxels.spacing_mm)
            cards.append(card)
            bar.set_postfix(bad=sum(bool(done.reason) for done in cards), refresh=False)
    return cards


def _draw_study(source: Source, ticket: Ticket, name: str, window: Window, out: Path) -> tuple[Card, StudyView | None]:
    """Draw one study; one that cannot be read gives a card that says why."""
    study = Study(ticket.number, ticket.image_id, "", ticket.corpus, ticket.split, "", "")
    page = f"{name}.html"
    with writing(out):
        (out / name).mkdir()
    try:
        study = source.study(ticket.number)
        voxels = source.voxels(study)
        view = draw_pictures(voxels, out / name, window)
    except OutputError:  # the fault of the disk, not of the study
        raise
    except UNREADABLE as problem:
        shutil.rmtree(out / name, ignore_errors=True)
        reason = problem.message if isinstance(problem, MG3DError) else f"{type(problem).__name__}: {problem}"
        return Card(study, page, reason=reason), None
    return Card(study, page, f"{name}/thumbnail.png", warned=bool(voxels.warnings)), view


def draw_pictures(voxels: Voxels, folder: Path, window: Window) -> StudyView:
    """Draw the strips, the overview and the thumbnail of one volume.

    Args:
        voxels: the volume.
        folder: where the PNG files go; exists.
        window: shown first for HU volumes; 8-bit volumes have one window.

    Returns:
        what the page needs to show them.
    """
    array, spacing = voxels.array, voxels.spacing_mm
    shown = GREY_WINDOW if voxels.unit == "grey" else window
    if shown == FULL_WINDOW:
        shown = full_window(voxels.window_hu)
    windows = _windows(shown, full_window(voxels.window_hu))
    panes = plan_panes(array.shape, spacing, pixel_mm(array.shape, spacing))
    for pane in panes:
        for item in windows:
            strip = draw_strip(array, pane.plane, pane.positions, item, pane.size_px)
            _save(strip, folder / f"{pane.plane.name}-{item.key}.png")
    _save(draw_overview(array, spacing, shown), folder / "overview.png")
    _save(draw_thumbnail(array, spacing, shown), folder / "thumbnail.png")
    return StudyView(voxels, summarise(voxels), panes, windows, shown, folder.name, list(voxels.warnings))


def _save(picture: Image, path: Path) -> None:
    with writing(path):
        picture.save(path, **PNG)


def _windows(shown: Window, full: Window) -> tuple[Window, ...]:
    if shown == GREY_WINDOW:
        return (GREY_WINDOW,)
    standard = [full if key == FULL_WINDOW.key else HU_WINDOWS[key] for key in SHOWN_WINDOWS]
    return tuple(standard if shown in standard else [shown, *standard])


def _finish(source: Source, cards: Sequence[Card], pages: Pages, statistics: DatasetStatistics) -> Summary:
    facts = gather(source.manifests())
    raw = all(card.study.shape is None for card in cards)
    values = index_values(statistics, facts, cards, source.kind, raw)
    bad = len(statistics.problems) + sum(bool(card.reason) for card in cards)
    pages.write_index(values, cards)
    size = sum(path.stat().st_size for path in pages.out.rglob("*") if path.is_file())
    summary = Summary(statistics.studies, len(cards), bad, len(cards) + 1, size)
    (pages.out / MARKER).write_text(json.dumps({"made by": "tools/visualize_datasets.py"}) + "\n", encoding="utf-8")
    return summary


def slug(name: str) -> str:
    """A file name made of an id: letters, digits, dash and underscore, at most 60."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[-60:].strip("-") or "study"
