"""The report gallery: one self-contained page with slices, reference, generated text, and which findings agree.

A finding is *matched* when both texts state it, *missed* when only the reference does, *invented* when only the
generated text does. D/H/W are the canonical axes (z to superior, y to posterior, x to the left); n cases.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.datasets.volume import PRETRAIN_SIZE_DHW
from mg3d.errors import DataError
from mg3d.finetuning.names import BASELINES, LABEL_TO_REPORT
from mg3d.finetuning.pictures.gallery_page import SCRIPT, STYLE, TEMPLATE
from mg3d.metrics.captioning import score_captions
from mg3d.scans.slices import PLANES, Plane, Window, draw_strip, extent_mm, frame_positions, frame_size, pixel_mm

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Case, ReportTask, Splits
    from mg3d.finetuning.config import FinetuneConfig

__all__ = [
    "PAGE",
    "GalleryCase",
    "Marked",
    "Pane",
    "case_of_row",
    "case_volumes",
    "choose_cases",
    "draw_panes",
    "mark_findings",
    "write_gallery",
    "write_run_gallery",
]

Reader = Callable[[str], Collection[str]]
Volumes = Callable[[str], np.ndarray | None]

PAGE = "gallery.html"
SHOWN_SCORES = ("bleu_1", "bleu_4", "rouge_l", "cider")
FINDINGS_F1 = "findings_f1"
GROUPS = ("worst", "best", "random")
MATCHED, MISSED, INVENTED = "matched", "missed", "invented"
UNIT_WINDOW = Window("unit", 0.5, 1.0)
FRAMES = 16
SIDES_PX = (128, 224)
QUALITY = 60
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_SIZE = "@size@"


@dataclass(frozen=True)
class GalleryCase:
    """One case of a run.

    Attributes:
        id: its name.
        reference: the text that was to be written.
        hypothesis: the generated text, possibly empty.
        others: title -> further text, such as a baseline's.
    """

    id: str
    reference: str
    hypothesis: str
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Marked:
    """A piece of a text.

    Attributes:
        text: its characters.
        status: the worst of its findings, "" for none.
        findings: (name, status) of each finding that it states.
    """

    text: str
    status: str = ""
    findings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Pane:
    """Slices of a plane in one picture, from top to bottom.

    Attributes:
        plane: which plane.
        width: pixels of a slice.
        height: pixels of a slice.
        positions: number of each slice along the axis.
        size: slices of the volume.
        uri: the picture as a data URI.
    """

    plane: Plane
    width: int
    height: int
    positions: tuple[int, ...]
    size: int
    uri: str


def write_gallery(
    path: Path,
    cases: Sequence[GalleryCase],
    *,
    count: int = 12,
    title: str = "Generated reports",
    facts: Sequence[str] = (),
    reader: Reader | None = None,
    volumes: Volumes | None = None,
    order_by: str = "",
    pretokenised: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the page.

    Args:
        path: file to write.
        cases: all cases of the run; ids once each.
        count: cases on the page: a third each of the worst, the best, and random ones.
        title: heading.
        facts: lines below the heading.
        reader: findings that a text states; None: nothing is marked.
        volumes: case id -> what the model saw, [D, H, W] in [0, 1], or None where there is no image.
        order_by: per-case score that says what is worst: findings_f1, bleu_1 to bleu_4, rouge_l, cider; empty:
            findings_f1 with a reader, else bleu_4.
        pretokenised: as in `score_captions`.
        seed: of the random cases.

    Returns:
        ``cases``, ``shown``, ``pictures`` and ``bytes``.

    Raises:
        DataError: no case, or no such score.
    """
    from jinja2 import Environment, StrictUndefined

    from mg3d.atomic import write_text_atomically

    if not cases or count < 1:
        raise DataError(f"{len(cases)} cases, {count} to be shown", "give at least one")
    scores = _scores(cases, reader, pretokenised)
    key = order_by or (FINDINGS_F1 if reader is not None else "bleu_4")
    if key not in scores:
        raise DataError(f"no score {key!r} of each case", f"choose one of {', '.join(scores)}")
    ties = scores["rouge_l"]
    chosen = choose_cases([(value, tie) for value, tie in zip(scores[key], ties, strict=True)], count, seed)
    shown = [
        _entry(cases[number], group, {name: column[number] for name, column in scores.items()}, reader, volumes)
        | {"rank": f"{scores[key][number]:.6f}"}
        for number, group in chosen.items()
    ]
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    text = page.render(
        title=title,
        facts=list(facts),
        cases=shown,
        total=len(cases),
        order_by=key,
        groups=[name for name in GROUPS if name in chosen.values()],
        marked=reader is not None,
        size=_SIZE,
        style=STYLE,
        script=SCRIPT,
        digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )
    text = text.replace(_SIZE, _megabytes(len(text.encode())), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text)
    return {
        "cases": len(cases),
        "shown": len(shown),
        "pictures": sum(bool(entry["panes"]) for entry in shown),
        "bytes": path.stat().st_size,
    }


def write_run_gallery(
    cfg: FinetuneConfig, task: ReportTask, splits: Splits, rows: Sequence[Mapping[str, Any]], run_dir: Path
) -> Path:
    """Write ``gallery.html`` of a run: ``extra["gallery"]`` of its reported cases."""
    column = "reference" if cfg.protocol == "clean" else "reference_published"
    write_gallery(
        run_dir / PAGE,
        [case_of_row(row, column) for row in rows],
        count=cfg.extra["gallery"],
        title=f"Reports of {cfg.benchmark}: {run_dir.parent.name}/{run_dir.name}",
        facts=[f"protocol {cfg.protocol}", f"{len(rows)} test cases"],
        reader=task.findings,
        volumes=case_volumes(cfg, task, splits.test),
        pretokenised=True,
        seed=cfg.seed,
    )
    return run_dir / PAGE


def case_volumes(cfg: FinetuneConfig, task: ReportTask, cases: Sequence[Case]) -> Volumes:
    """Case id -> what the model saw of it, read when asked for."""
    from mg3d.datasets.classification import fit_centre, read_case, resolve_loader

    load, images = resolve_loader(task.load), {case.id: case for case in cases}

    def volume(name: str) -> np.ndarray | None:
        return fit_centre(read_case(load, images[name], cfg), task.size_dhw) if name in images else None

    return volume


def case_of_row(row: Mapping[str, Any], column: str = "reference") -> GalleryCase:
    """The case of a row of ``per_case.csv``."""
    others = {BASELINES[LABEL_TO_REPORT]: str(row[LABEL_TO_REPORT])} if row.get(LABEL_TO_REPORT) else {}
    return GalleryCase(str(row["id"]), str(row[column]), str(row["hypothesis"]), others)


def choose_cases(values: Sequence[tuple[float, ...]], count: int, seed: int = 0) -> dict[int, str]:
    """Choose cases to look at.

    Args:
        values: what ranks each case, higher is better.
        count: how many; a third each of the worst, the best and random ones, the earlier kinds first.
        seed: of the random ones.

    Returns:
        number of the case -> worst, best or random; the worst first, then from the best down, then by number.
    """
    ranked = sorted(range(len(values)), key=lambda number: (values[number], number))
    shares = [(min(count, len(values)) + 2 - place) // 3 for place in range(3)]
    worst = ranked[: shares[0]]
    best = ranked[len(ranked) - shares[1] :][::-1] if shares[1] else []
    rest = sorted(set(ranked) - {*worst, *best})
    drawn = sorted(random.Random(seed).sample(rest, min(shares[2], len(rest))))
    parts = zip(GROUPS, (worst, best, drawn), strict=True)
    return {number: group for group, numbers in parts for number in numbers}


def _scores(cases: Sequence[GalleryCase], reader: Reader | None, pretokenised: bool) -> dict[str, list[float]]:
    """Per-case scores, that of the findings first."""
    ids = [case.id for case in cases]
    repeated = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
    if repeated is not None:
        raise DataError(f"case {repeated!r} is there twice", "give each case once")
    wording = score_captions(
        [case.reference for case in cases],
        [case.hypothesis for case in cases],
        ids=ids,
        pretokenised=pretokenised,
        meteor="none",
    ).per_case
    found = {name: [float(value) for value in column] for name, column in wording.items()}
    if reader is None:
        return found
    both = [(set(reader(case.reference)), set(reader(case.hypothesis))) for case in cases]
    return {FINDINGS_F1: [_f1(wanted, stated) for wanted, stated in both], **found}


def _f1(wanted: set[str], stated: set[str]) -> float:
    """1 where neither text states a finding: nothing was missed and nothing invented."""
    return 2 * len(wanted & stated) / (len(wanted) + len(stated)) if wanted or stated else 1.0


def _entry(
    case: GalleryCase, group: str, scores: Mapping[str, float], reader: Reader | None, volumes: Volumes | None
) -> dict[str, Any]:
    """What the template shows of a case."""
    wanted = set(reader(case.reference)) if reader is not None else set()
    stated = set(reader(case.hypothesis)) if reader is not None else set()
    status = {name: MATCHED if name in stated else MISSED for name in wanted}
    status |= {name: INVENTED for name in stated - wanted}
    voxels = volumes(case.id) if volumes is not None else None
    kept = [name for name in (FINDINGS_F1, *SHOWN_SCORES) if name in scores]
    return {
        "id": case.id,
        "group": group,
        "scores": [(name, f"{scores[name]:.3f}") for name in kept],
        "chips": [(kind, sorted(n for n in status if status[n] == kind)) for kind in (MATCHED, MISSED, INVENTED)],
        "reference": mark_findings(case.reference, reader, status),
        "hypothesis": mark_findings(case.hypothesis, reader, status),
        "others": [
            (title, mark_findings(text, reader, _beside(text, reader, wanted))) for title, text in case.others.items()
        ],
        "panes": draw_panes(voxels) if voxels is not None else (),
    }


def _beside(text: str, reader: Reader | None, wanted: set[str]) -> dict[str, str]:
    """Status of the findings of a third text against the reference."""
    return {name: MATCHED if name in wanted else INVENTED for name in (reader(text) if reader is not None else ())}


def mark_findings(text: str, reader: Reader | None, status: Mapping[str, str]) -> list[Marked]:
    """Cut a text into pieces and say which of them state a finding.

    Args:
        text: a report.
        reader: findings that a text states; None marks nothing.
        status: finding -> matched, missed or invented; others are not marked.

    Returns:
        Pieces that give the text when joined; a piece with a status is a sentence that states findings.
    """
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    pieces: list[Marked] = []
    for start, end in itertools.pairwise(ends):
        sentence = text[start:end].rstrip()
        stated = sorted(set(reader(sentence)) & set(status)) if reader is not None and sentence else []
        if stated:
            found = tuple((name, status[name]) for name in stated)
            worst = next(kind for kind in (INVENTED, MISSED, MATCHED) if kind in dict(found).values())
            pieces += [Marked(sentence, worst, found), Marked(text[start + len(sentence) : end])]
        else:
            pieces.append(Marked(text[start:end]))
    return [piece for piece in pieces if piece.text]


def draw_panes(voxels: np.ndarray, spacing: Sequence[float] | None = None) -> tuple[Pane, ...]:
    """Draw slices of the three planes as compressed data URIs.

    Args:
        voxels: [D, H, W] in [0, 1], canonical axes.
        spacing: size of a voxel (z, y, x), any unit; None: the box of pre-training at this many voxels.

    Raises:
        DataError: another number of axes, or values that are not finite.
    """
    if voxels.ndim != 3 or not np.isfinite(voxels).all():
        raise DataError(f"a picture of shape {voxels.shape}", "give finite values [D, H, W]")
    steps = spacing or [whole / size for whole, size in zip(PRETRAIN_SIZE_DHW, voxels.shape, strict=True)]
    extents, step = extent_mm(voxels.shape, steps), pixel_mm(voxels.shape, steps, *SIDES_PX)
    panes = []
    for plane in PLANES:
        width, height = frame_size(plane, extents, step)
        positions = frame_positions(voxels.shape[plane.axis], width * height, FRAMES)
        strip = draw_strip(voxels, plane, positions, UNIT_WINDOW, (width, height))
        panes.append(Pane(plane, width, height, tuple(positions), voxels.shape[plane.axis], _uri(strip)))
    return tuple(panes)


def _uri(picture: Any) -> str:
    """A grey picture as WebP, or as JPEG where Pillow was built without it."""
    from PIL import features

    kind = "webp" if features.check("webp") else "jpeg"
    stream = io.BytesIO()
    picture.save(stream, kind, quality=QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{max(count / 1e3, 1):.0f} kB"
