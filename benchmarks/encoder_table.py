"""Table of all image encoders on the CPU: weights, tokens, operations, memory, and time beside MONAI's Swin.

Every figure comes from a fresh process with batch 1. Encoders take turns, the fastest of all rounds counts, and times
are divided by those of MONAI's ``SwinTransformer`` (Swin-B's size) of the same run. Memory is the largest resident size
beyond that after the imports, weights included. Prints a Markdown table and, as the last line, one JSON object.

    python benchmarks/encoder_table.py [--rounds 3] [--threads 2] [--size 128x96x128] [--encoders unet nnunet]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import MIN_ROUNDS, run_fresh
from mg3d.config_schema import VISION_ENCODERS

MONAI = "monai_swin_transformer"
MODES = ("forward", "both")
TITLES = (
    "encoder",
    "weights (M)",
    "tokens",
    "GFLOPs",
    "memory forward (GiB)",
    "memory forward + backward (GiB)",
    "forward (s)",
    "against MONAI",
    "forward + backward (s)",
    "against MONAI",
)


def measure(encoders: list[str], rounds: int, common: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results of every encoder and mode, one entry a round."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {mode: [] for mode in MODES} for name in encoders}
    for number in range(rounds):
        for mode in MODES:
            for name in encoders:
                result = run_fresh("encoder_subject", {"encoder": name, "mode": mode} | common)
                found[name][mode].append(result)
                seconds = f"{result['wall_s']:.2f} s, processor {result['cpu_s']:.2f} s"
                print(f"round {number + 1} {name:24s} {mode:8s} {seconds}", file=sys.stderr)
    return found


def summarise(found: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """One row an encoder: the smallest times and their ratio to MONAI's, the largest memory of the rounds."""
    rows: dict[str, dict[str, Any]] = {}
    for name, modes in found.items():
        first = modes["forward"][0]
        row = {"parameters": first["parameters"], "tokens": first["tokens"], "gflops": round(first["gflops"], 1)}
        for mode, results in modes.items():
            row[f"{mode}_peak_gib"] = round(max(each["peak_gib"] for each in results), 3)
            for clock in ("wall", "cpu"):
                row[f"{mode}_{clock}_s"] = min(each[f"{clock}_s"] for each in results)
        rows[name] = row
    for row in rows.values():
        for mode in MODES:
            for clock in ("wall", "cpu"):
                key = f"{mode}_{clock}"
                row[f"{key}_against_monai"] = round(row[f"{key}_s"] / rows[MONAI][f"{key}_s"], 3)
    return rows


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Rows of :func:`summarise` as a Markdown table."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for name, row in rows.items():
        cells = [
            f"`{name}`" if name != MONAI else "MONAI `SwinTransformer`, Swin-B's size",
            f"{row['parameters'] / 1e6:.1f}",
            " x ".join(map(str, row["tokens"])),
            f"{row['gflops']:.0f}",
            *(f"{row[f'{mode}_peak_gib']:.2f}" for mode in MODES),
        ]
        for mode in MODES:
            cells += [f"{row[f'{mode}_wall_s']:.2f}", f"{row[f'{mode}_wall_against_monai']:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", default="128x96x128", help="voxels, DxHxW")
    parser.add_argument("--encoders", nargs="+", choices=VISION_ENCODERS, default=list(VISION_ENCODERS))
    options = parser.parse_args()
    common = {"size": options.size, "threads": options.threads}
    rows = summarise(measure([MONAI, *options.encoders], options.rounds, common))
    print(markdown(rows))
    print(json.dumps({"size": options.size, "threads": options.threads, "rounds": options.rounds, "encoders": rows}))


if __name__ == "__main__":
    main()
