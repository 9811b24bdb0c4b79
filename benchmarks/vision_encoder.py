"""Speed and memory of the Swin-B encoder on the CPU beside MONAI's own ``SwinTransformer`` with the same weights.

Every subject runs in a fresh process: ours and MONAI's take turns for several rounds, and the ratios are those of the
fastest rounds. Forward and backward is the gradient of a sum over all five feature maps. Memory is the peak of one
forward and backward beyond what the process held after its imports. The last line is one JSON object; ratios above 1
(``speedup_*``) and below 1 (``memory_ratio``) are in our favour.

    python benchmarks/vision_encoder.py [--rounds 3] [--threads 2] [--size 128 96 128] [--precision float32 bfloat16]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import MIN_ROUNDS, best_of_turns, run_fresh

ENCODERS = ("ours", "monai")


def measure(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run all subjects of one number type and compare them.

    Args:
        precision: ``float32`` or ``bfloat16`` (autocast).
        options: parsed command line.

    Returns:
        the figures of the JSON line, without prefix.
    """
    common = {"precision": precision, "threads": options.threads, "size": ",".join(map(str, options.size))}
    best = best_of_turns(
        "vision_subject",
        {name: {"encoder": name} | common for name in ENCODERS},
        options.rounds,
        lambda number, name, result: (
            f"{precision} round {number} {name:5s} forward {result['forward_s']:6.2f} s, with backward "
            f"{result['forward_backward_s']:6.2f} s, peak {result['beyond_imports_gib']:5.2f} GiB beyond imports"
        ),
    )
    ours, monai = best["ours"], best["monai"]
    return {
        "speedup_fwd_bwd": round(monai["forward_backward_s"] / ours["forward_backward_s"], 3),
        "speedup_fwd": round(monai["forward_s"] / ours["forward_s"], 3),
        "memory_ratio": round(ours["beyond_imports_gib"] / monai["beyond_imports_gib"], 3),
        "max_abs_diff": run_fresh("vision_subject", {"encoder": "difference"} | common)["max_abs_diff"],
        "forward_backward_s": round(ours["forward_backward_s"], 3),
        "monai_forward_backward_s": round(monai["forward_backward_s"], 3),
        "forward_s": round(ours["forward_s"], 3),
        "monai_forward_s": round(monai["forward_s"], 3),
        "peak_gib": round(ours["beyond_imports_gib"], 3),
        "monai_peak_gib": round(monai["beyond_imports_gib"], 3),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures.

    Args:
        arguments: command line without the program name.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="interleaved rounds, at least 3")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads")
    parser.add_argument("--size", type=int, nargs=3, default=[128, 96, 128], metavar=("D", "H", "W"))
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"threads": options.threads, "size": options.size}
    for precision in options.precision:
        prefix = "" if precision == "float32" else "bf16_"
        result |= {f"{prefix}{key}": value for key, value in measure(precision, options).items()}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
