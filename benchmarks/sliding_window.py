"""Whole-volume segmentation on the CPU: our encoder in MONAI's SwinUNETR beside MONAI's own SwinUNETR, same weights.

A phantom chest of 300 slices goes through a sliding window (Swin-B, 96 x 96 x 96, overlap 0.25). Every subject runs in
a fresh process, both take turns for several rounds, and the ratios are those of the fastest rounds. Memory is the peak
beyond what the process held before the network was built. The last line is one JSON object: ``speed_ratio`` (MONAI's
seconds over ours) above 1 and ``memory_ratio`` (our GiB over MONAI's) below 1 are in our favour.

    python benchmarks/sliding_window.py [--rounds 3] [--threads 2] [--size 128 128 300] [--roi 96 96 96]
    python benchmarks/sliding_window.py --small     # a minute or two: narrow network, 64 slices
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import MIN_ROUNDS, best_of_turns, run_fresh

NETWORKS = ("ours", "monai")
SMALL = {"size": [64, 64, 64], "roi": [64, 64, 32], "feature_size": 12}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both subjects in turns and compare their fastest rounds.

    Args:
        options: parsed command line.

    Returns:
        the figures of the JSON line.
    """
    common = {
        "threads": options.threads,
        "size": ",".join(map(str, options.size)),
        "roi": ",".join(map(str, options.roi)),
        "feature-size": options.feature_size,
        "overlap": options.overlap,
    }
    best = best_of_turns(
        "sliding_window_subject",
        {name: {"network": name} | common for name in NETWORKS},
        options.rounds,
        lambda number, name, result: (
            f"round {number} {name:5s} {result['seconds']:7.2f} s for {result['windows']} windows, "
            f"peak {result['peak_gib']:5.2f} GiB"
        ),
    )
    ours, monai = best["ours"], best["monai"]
    return {
        "speed_ratio": round(monai["seconds"] / ours["seconds"], 3),
        "memory_ratio": round(ours["peak_gib"] / monai["peak_gib"], 3),
        "seconds": round(ours["seconds"], 3),
        "monai_seconds": round(monai["seconds"], 3),
        "peak_gib": round(ours["peak_gib"], 3),
        "monai_peak_gib": round(monai["peak_gib"], 3),
        "windows": ours["windows"],
        "max_abs_diff": run_fresh("sliding_window_subject", {"network": "difference"} | common)["max_abs_diff"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures.

    Args:
        arguments: command line without the program name.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="interleaved rounds, at least 3")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads")
    parser.add_argument("--size", type=int, nargs=3, default=[128, 128, 300], metavar=("X", "Y", "Z"))
    parser.add_argument("--roi", type=int, nargs=3, default=[96, 96, 96], metavar=("X", "Y", "Z"))
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--small", action="store_true", help=f"a quick look: {SMALL}")
    options = parser.parse_args(arguments)
    if options.small:
        vars(options).update(SMALL)
    shown = {name: getattr(options, name) for name in ("threads", "size", "roi", "feature_size", "overlap")}
    print(json.dumps(shown | measure(options)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
