"""Time and memory of one pre-training step on the CPU, at the published size.

Three kinds of subjects, each in a fresh process:

* memory: peak of two steps with batch 1, and with gradient checkpointing at batch 1 and 2; the total, and the part
  beyond what the process held after its imports.
* speed: seconds of a step by part, and the ratio of the whole step (optimizer included) to the least it must do: 2
  MONAI ``SwinTransformer`` forward and backward, 2 text encodings, 1 decoder forward and backward. Step and reference
  take turns; the ratio is that of the fastest rounds.
* fusion: the closed form of the cross attentions against the published loops, see ``loop_fusion.py``.

The last line is one JSON object.

    python benchmarks/pretrain_step.py [--size published] [--rounds 3] [--threads 0]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import MIN_ROUNDS, run_fresh

MEMORY = {"peak": (1, 0), "peak_checkpointed": (1, 1), "peak_checkpointed_batch2": (2, 1)}
"""Subject -> batch size and whether activations are recomputed."""


def measure_memory(common: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of every memory subject in GiB, one process after the other."""
    result: dict[str, Any] = {}
    for name, (batch, checkpointed) in MEMORY.items():
        found = run_fresh("step_subjects", {"subject": "memory", "batch": batch, "checkpointed": checkpointed} | common)
        total, beyond = found["total_gib"], found["beyond_imports_gib"]
        print(f"{name:26s} {total:6.2f} GiB in all, {beyond:6.2f} GiB beyond imports, step {found['step_s']:.2f} s")
        head, _, rest = name.partition("_")
        key = f"{head}_gib_{rest}".rstrip("_")
        result |= {key: round(total, 3), f"{key}_beyond_imports": round(beyond, 3)}
    return result


def measure_speed(common: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step and its ratio to the reference work."""
    found = run_fresh("step_subjects", {"subject": "speed"} | common)
    for name, seconds in found["rounds_s"].items():
        print(f"{name:10s} rounds: {', '.join(f'{each:.2f}' for each in seconds)} s")
    for part, seconds in found["parts_s"].items():
        print(f"{part:10s} {seconds:8.3f} s of the fastest step")
    kept = ("step_s", "step_cpu_s", "reference_s", "overhead_ratio", "overhead_ratio_cpu", "threads")
    parts = {part: round(seconds, 4) for part, seconds in found["parts_s"].items()}
    return {key: round(found[key], 4) for key in kept} | {"parts_s": parts}


def measure_fusion(common: dict[str, Any]) -> dict[str, Any]:
    """Speed of the closed form of the fusion over loops, and how far both are apart."""
    found = run_fresh("step_subjects", {"subject": "fusion"} | common)
    for key, what in (("seconds", "without projections"), ("layers_seconds", "whole layers")):
        for form, seconds in found[key].items():
            print(f"fusion, {form:9s} {what:20s} {1000 * seconds:9.2f} ms forward and backward")
    bare, whole = found["seconds"], found["layers_seconds"]
    return {
        "fusion_speedup": round(bare["loops"] / bare["closed"], 1),
        "fusion_speedup_published_form": round(bare["published"] / bare["closed"], 1),
        "fusion_speedup_with_projections": round(whole["loops"] / whole["closed"], 1),
        "fusion_difference": found["largest_difference"],
    }


SUBJECTS = {"memory": measure_memory, "speed": measure_speed, "fusion": measure_fusion}


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["published", "tiny"], default="published", help="tiny is for smoke tests")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="interleaved rounds, at least 3")
    parser.add_argument("--threads", type=int, default=0, help="intra-op threads, 0 for torch's choice")
    parser.add_argument("--only", choices=SUBJECTS, action="append", help="measure this only; may be repeated")
    options = parser.parse_args()
    common = {"size": options.size, "rounds": max(options.rounds, MIN_ROUNDS), "threads": options.threads}
    result: dict[str, Any] = {"size": options.size, "rounds": common["rounds"]}
    for name, measure in SUBJECTS.items():
        if options.only is None or name in options.only:
            result |= measure(common)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
