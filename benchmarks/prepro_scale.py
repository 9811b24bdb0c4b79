"""How packing, verifying and random reading grow with the number of rows.

    python -m benchmarks.prepro_scale [--small 1000] [--large 10000] [--rounds 2]

Every figure comes from a fresh process and a synthetic reader of tiny volumes with short reports. ``time_ratio`` is
time(large) / time(small) in processor seconds, minimum over the rounds; ``slope_mib`` is the growth of the peak memory
per 1,000 rows, pages of mapped files left out because the kernel takes them back at will. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness import run_fresh
from mg3d.datasets.arrow_files import find_arrow_files
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.scans.geometry import Geometry
from prepro.make_arrow import PackOptions, pack
from prepro.readers.base import Case, CaseList, PackedImage
from prepro.splits import assign_splits
from prepro.verification.command import build_verify_parser
from prepro.verification.run import verify

SHAPE = (8, 8, 8)
WORDS = "lungs clear no nodule pleural effusion heart size normal trachea open both sides left right lobe".split()
SUBJECTS = ("pack", "verify", "read")
MAX_RATIO = 11.0
MAX_SLOPE_MIB = 2.0


class ToyReader:
    """A corpus of the wanted size whose scans are made up when they are asked for."""

    corpus = "clm_ct_rate"
    label_names: ClassVar[tuple[str, ...]] = ()
    window = "[-1000,1000]"

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def find_cases(self) -> CaseList:
        """List the scans."""
        found = CaseList(entries=self._rows)
        for number in range(self._rows):
            origin = "valid" if number % 20 == 0 else "train"
            words = random.Random(number)
            text = " ".join(words.choices(WORDS, k=40)) + "."
            name = f"{origin}_{number}_a_1"
            found.cases.append(Case(name, f"{origin}_{number}", origin, (Path(f"{name}.nii.gz"),), text, text[:40]))
        return found

    def load(self, case: Case) -> PackedImage:
        """Make a scan up."""
        number = int(case.image_id.split("_")[1])
        voxels = np.random.default_rng(number).integers(-1000, 1000, SHAPE).astype(np.int16)
        return PackedImage(voxels, (1.5, 0.75, 0.75), {"source_sha256": f"{number:064x}"})


def pack_rows(rows: int, folder: Path) -> None:
    """Pack a corpus."""
    reader = ToyReader(rows)
    cases, unused = assign_splits(reader.find_cases(), reader.corpus)
    geometry = Geometry(size=SHAPE, target_spacing_mm=None)
    pack(reader, cases, unused, PackOptions(folder, geometry))


def verify_rows(rows: int, folder: Path) -> None:
    """Verify it in this process."""
    report = verify(build_verify_parser().parse_args([str(folder), "--workers", "1"]))
    if report.count("error"):
        raise SystemExit(f"verification found {report.findings[0]}")


def read_rows(rows: int, folder: Path) -> None:
    """Read every row once, in random order."""
    files = [path for split in ("train", "val", "test") for path in find_arrow_files(folder, ToyReader.corpus, split)]
    table = ArrowTable(files)
    order = random.Random(0).sample(range(len(table)), len(table))
    if sum(int(table.row(index)["image"].size) for index in order) != rows * int(np.prod(SHAPE)):
        raise SystemExit("rows are missing")


WORK: dict[str, Callable[[int, Path], None]] = {"pack": pack_rows, "verify": verify_rows, "read": read_rows}


def measure(subject: str, rows: int, folder: Path) -> dict[str, float]:
    """Do one thing once in this process.

    Args:
        subject: a key of :data:`WORK`.
        rows: size of the corpus.
        folder: where it is packed.

    Returns:
        wall and processor seconds, and the growth of the memory in MiB.
    """
    before = peak = _anonymous_mib()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _anonymous_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), time.thread_time()
    WORK[subject](rows, folder)
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.thread_time() - cpu}
    done.set()
    watcher.join()
    return {**figures, "grown_mib": max(peak, _anonymous_mib()) - before}


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def compare(small: int, large: int, rounds: int) -> dict[str, Any]:
    """Measure every subject at both sizes.

    Args:
        small: rows of the small corpus.
        large: rows of the large one.
        rounds: repetitions, sizes alternating.

    Returns:
        figures per subject and whether all bars are met.
    """
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for rows in (small, large):
                folder = Path(scratch) / f"{rows}_{number}"
                for subject in SUBJECTS:
                    figures = run_fresh("prepro_scale", {"subject": subject, "large": rows, "folder": folder})
                    found.setdefault((subject, rows), []).append(figures)
                    sys.stderr.write(f"{subject} {rows}: {json.dumps(figures)}\n")
    subjects = {subject: _grown(found[subject, small], found[subject, large], large - small) for subject in SUBJECTS}
    met = all(f["time_ratio"] <= MAX_RATIO and f["slope_mib"] < MAX_SLOPE_MIB for f in subjects.values())
    return {"small": small, "large": large, **subjects, "bars_met": met}


def _grown(small: list[dict[str, float]], large: list[dict[str, float]], more_rows: int) -> dict[str, float]:
    def least(runs: list[dict[str, float]], key: str) -> float:
        return min(run[key] for run in runs)

    slope = (least(large, "grown_mib") - least(small, "grown_mib")) / (more_rows / 1000)
    return {
        "time_ratio": round(least(large, "cpu_s") / least(small, "cpu_s"), 2),
        "wall_ratio": round(least(large, "wall_s") / least(small, "wall_s"), 2),
        "large_s": round(least(large, "cpu_s"), 2),
        "slope_mib": round(slope, 3),
    }


def main() -> int:
    """Measure, print, and say with the exit code whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1000, help="rows of the small corpus")
    parser.add_argument("--large", type=int, default=10000, help="rows of the large corpus")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of everything")
    parser.add_argument("--subject", choices=SUBJECTS, help="measure one thing in this process")
    parser.add_argument("--folder", type=Path, help="folder of the subject's corpus")
    options = parser.parse_args()
    if options.subject:
        figures: dict[str, Any] = measure(options.subject, options.large, options.folder)
    else:
        figures = compare(options.small, options.large, options.rounds)
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0 if figures.get("bars_met", True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
