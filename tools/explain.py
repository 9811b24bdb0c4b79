"""Show how a model connects a scan with each sentence of its report.

    python tools/explain.py SCAN --weights W --report report.txt --out result/explained
    python tools/explain.py SCAN --weights W --reports reports.csv --out result/explained
    python tools/explain.py SCAN --weights W --findings "..." --impression "..." --out result/explained

writes DIR/index.html, one self-contained page for the browser (no network), and one PNG per sentence. The maps are the
gates of the fusion layers between sentence and image tokens: coarse, and no diagnosis (the page says so with numbers).
SCAN is a NIfTI, NRRD or MetaImage file, or DICOM (folder or multi-frame file). The last line of standard output is one
JSON object. Exit code 0: written; 1: the run broke down; 2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.atomic import atomic_folder  # noqa: E402 - the lines above make it importable
from mg3d.command_line import Parser, exit_code_of, print_json_line  # noqa: E402
from mg3d.errors import DataError  # noqa: E402
from mg3d.locks import exclusive_output  # noqa: E402
from tools.weights_options import add_weights_options, check_scan, check_weights, open_model, open_processor  # noqa: E402

if TYPE_CHECKING:
    from mg3d.datasets.report_text import ReportEncoding, ReportSections
    from mg3d.inference.explanation import SentenceMaps
    from mg3d.inference.model import MG3DModel
    from mg3d.inference.processor import ProcessedScan, Processor
    from tools.explanation.colours import Contrast
    from tools.explanation.page import Explained
    from tools.reports import Report

PAGE = "index.html"
SHOWN_SIDE = 192
MIDDLE = (0.5, 0.5, 0.5)
WINDOWS = ("lung", "mediastinum", "full")
_PICTURE = re.compile(r"sentence_\d{3}\.png")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path, help="the scan")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for page and pictures")
    text = parser.add_argument_group("report (one of the three)")
    text.add_argument("--report", type=Path, metavar="FILE", help="text with the headings Findings: and Impression:")
    text.add_argument("--reports", type=Path, metavar="CSV", help="table that has a row for the scan")
    text.add_argument("--findings", metavar="TEXT", help="findings, in words")
    text.add_argument("--impression", metavar="TEXT", help="impression, in words")
    parser.add_argument(
        "--shifts", type=int, choices=(1, 2, 4), default=1, help="places per token and axis; N^3 passes (%(default)s)"
    )
    parser.add_argument("--window", choices=WINDOWS, default=WINDOWS[0], help="HU window shown first (%(default)s)")
    add_weights_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Explain one scan.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    remedy = "check space and permissions of --out"
    return exit_code_of(
        lambda: print_json_line(run(options)),
        disk_code=1,
        disk_remedy=remedy,
        interrupted="interrupted; nothing was written",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compute the maps, draw them and write the folder.

    Args:
        options: parsed command line.

    Returns:
        what the last line of standard output shows.

    Raises:
        MG3DError: bad input.
    """
    started = time.perf_counter()
    scan = check_scan(options.scan)
    refuse_foreign_folder(options.out)
    report = find_report(options, scan)
    check_weights(options.weights)
    with exclusive_output(options.out):
        return _explain(options, scan, report, started)


def _explain(options: argparse.Namespace, scan: Path, report: Report, started: float) -> dict[str, Any]:
    model = open_model(options)
    processor = open_processor(options, model)
    explained = explain(model, processor, scan, report, options.shifts)
    size = write_folder(explained, options.out, options.window)
    spread = explained.maps.spread()
    return {
        "scan": explained.name,
        "sentences": len(explained.maps.sentences),
        "not_read": len(explained.unseen),
        "token_grid": list(explained.maps.token_grid),
        "map_grid": list(explained.maps.gates.shape[1:]),
        "largest_spread": round(float(spread.max()), 6),
        "nearly_flat": explained.maps.flat,
        "page": str(options.out / PAGE),
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 1),
    }


def refuse_foreign_folder(out: Path) -> None:
    """Raise DataError when ``out`` exists and is neither empty nor an older explanation."""
    if not out.exists():
        return
    names = [entry.name for entry in out.iterdir()] if out.is_dir() else [""]
    if any(name != PAGE and not _PICTURE.fullmatch(name) for name in names):
        raise DataError("holds something else", "name an empty or new folder as --out", path=str(out))


def find_report(options: argparse.Namespace, scan: Path) -> Report:
    """The report from the one source that the options give.

    Raises:
        DataError: no or several sources, or no report there.
    """
    from tools.reports import ReportTable, read_report, report_of_words

    words = options.findings is not None or options.impression is not None
    if sum((options.report is not None, options.reports is not None, words)) != 1:
        raise DataError(
            "one report is needed", "give --report FILE, or --reports CSV, or --findings TEXT with --impression TEXT"
        )
    if words:
        return report_of_words(options.findings, options.impression)
    if options.report:
        return read_report(options.report, options.encoding)
    found = ReportTable.open(options.reports, options.encoding).report(str(scan.resolve()))
    return report_of_words(found.findings, found.impression)


def explain(model: MG3DModel, processor: Processor, scan: Path, report: Report, shifts: int) -> Explained:
    """Compute everything that page and pictures show.

    Args:
        model: holds text encoder and fusion layers.
        processor: prepares the scan.
        scan: its path.
        report: its report.
        shifts: places per token and axis.

    Raises:
        MG3DError: no fusion layers, an unreadable scan, or no sentence.
    """
    import torch

    from mg3d.datasets.report_text import encode_report, prepare_sections, whole_fragments
    from mg3d.inference.explanation import explain_report
    from prepro.readers.tables import strip_suffix
    from tools.explanation.page import Explained

    network = model.network
    sections = prepare_sections(report.findings, report.impression)
    length = network.options.max_text_len
    encoding = encode_report(
        model.tokenizer, sections.findings_sen, sections.impression_sen, max_text_len=length, sent_level=False
    )
    if not encoding.sentences:
        raise DataError("the report holds no sentence of three words or more", "give a longer one")
    prepared = processor(scan)
    volume = torch.from_numpy(prepared.volumes).to(model.device)
    try:
        maps = explain_report(network, volume, encoding, shifts=shifts, progress=_bar)
    except ValueError as error:
        raise DataError(str(error), "choose another --shifts") from error
    voxels, spacing_mm = shown_voxels(processor, prepared, scan)
    findings = len(whole_fragments(sections.findings_sen))
    return Explained(
        name=strip_suffix(scan.resolve().name),
        voxels=voxels,
        spacing_mm=spacing_mm,
        maps=maps,
        contrasts=make_contrasts(maps),
        sections=tuple("F" if place < findings else "I" for place in range(len(encoding.sentences))),
        unseen=_unseen(sections, encoding),
        facts=describe(model, prepared, maps, length),
        warnings=prepared.warnings,
        pictures=[f"sentence_{place:03d}.png" for place in range(1, len(encoding.sentences) + 1)],
    )


def _unseen(sections: ReportSections, encoding: ReportEncoding) -> tuple[str, ...]:
    from mg3d.datasets.report_text import whole_fragments

    return tuple(whole_fragments([*sections.findings_sen, *sections.impression_sen])[len(encoding.sentences) :])


def _bar(places: Iterator[tuple[int, int, int]], total: int) -> Iterator[tuple[int, int, int]]:
    from tqdm import tqdm

    return iter(tqdm(places, total=total, desc="passes", unit="pass", disable=total < 2, dynamic_ncols=True))


def shown_voxels(processor: Processor, prepared: ProcessedScan, scan: Path) -> tuple[Any, tuple[float, float, float]]:
    """The part of the scan that the model sees, at nearly cubic voxels fine enough to look at.

    Returns:
        int16 HU [D, H, W], and the spacing (z, y, x) in mm.
    """
    import numpy as np

    extents = [size * step for size, step in zip(prepared.size_dhw, prepared.spacing_mm, strict=True)]
    edge = max(extents) / SHOWN_SIDE
    depth, height, width = (max(round(extent / edge), 1) for extent in extents)
    shown = dataclasses.replace(processor, size_dhw=(depth, height, width))(scan)
    low, high = processor.window_hu
    return np.rint(shown.volumes[0, 0] * (high - low) + low).astype(np.int16), shown.spacing_mm


def make_contrasts(maps: SentenceMaps) -> tuple[Contrast, ...]:
    """The three ways of showing the gates."""
    from tools.explanation.colours import diverging_contrast, rising_contrast

    return (
        rising_contrast(
            "gate", "gate", "mean over the words of the sentence and over both fusion layers, 0 to 1.", maps.gates
        ),
        diverging_contrast(
            "relative",
            "against the other sentences",
            "the gate minus the mean of all sentences at the same place; red: more than they have there, blue: less.",
            maps.relative(),
        ),
        diverging_contrast(
            "placed",
            "within the scan",
            "as before, minus the sentence's own mean over the scan: only where it is higher or lower remains.",
            maps.placed(),
        ),
    )


def describe(model: MG3DModel, prepared: ProcessedScan, maps: SentenceMaps, length: int) -> list[tuple[str, str]]:
    """What the page states about scan, weights and maps."""

    def times(values: Any) -> str:
        return " × ".join(f"{value:.4g}" for value in values)

    layers = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in ((m.min(), m.max()) for m in maps.layers))
    rows = [
        ("acquired voxels (z, y, x)", times(prepared.record.get("stored_shape_DHW", ()))),
        ("acquired spacing (z, y, x)", times(prepared.record.get("stored_spacing_mm", ())) + " mm"),
        ("model input (z, y, x)", times(prepared.size_dhw)),
        ("its voxels", times(prepared.spacing_mm) + " mm"),
        ("cells of one pass", times(maps.token_grid)),
        ("cells of the maps", times(maps.gates.shape[1:])),
        ("gates, layer by layer", layers),
        ("longest text", f"{length} tokens"),
        ("weights", Path(model.name).name),
        ("image encoder", f"{model.vision_encoder.name}, {model.vision_encoder.out_channels} channels"),
    ]
    return [(key, value) for key, value in rows if value.strip(" m")]


def write_folder(explained: Explained, out: Path, window: str) -> int:
    """Write page and pictures; the folder appears, or is replaced, when all are drawn.

    Returns:
        bytes of the page.
    """
    from mg3d.inference.explanation import peak_place
    from mg3d.scans.slices import HU_WINDOWS
    from tools.explanation.page import render_page
    from tools.explanation.pictures import draw_sentence

    windows = [HU_WINDOWS[key] for key in (window, *(key for key in WINDOWS if key != window))]
    with atomic_folder(out) as staging:
        for place, name in enumerate(explained.pictures):
            title = f"{place + 1}. {explained.maps.sentences[place]}"
            where = MIDDLE if explained.maps.flat else peak_place(explained.contrasts[-1].values[place])
            still = draw_sentence(
                explained.voxels, explained.spacing_mm, windows[0], explained.contrasts, place, title, where
            )
            still.save(staging / name, optimize=True)
        page = render_page(explained, windows)
        (staging / PAGE).write_text(page, encoding="utf-8", errors="replace")
    return (out / PAGE).stat().st_size


if __name__ == "__main__":
    raise SystemExit(main())
