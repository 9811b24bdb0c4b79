"""Time and memory of packing one CT: this project's path against the straightforward one, and its scaling.

The study is synthetic: 512 x 512 x 300 voxels of 0.7 x 0.7 x 1.0 mm, int16 HU with noise, written as nibabel writes
``.nii.gz`` (it compresses 2.1 times, as real CT does). Every subject runs in a fresh process with one thread.

* speed: whole read with CRC and SHA-256, rescale decision, canonical directions, resampling, rounding; against
  ``straightforward`` of ``prepro_subjects.py``. Both take turns; the ratio is that of the fastest rounds.
* memory: peak beyond what the process held after its imports, over the bytes of the stored voxels.
* scaling: rows per second of the packing engine with 2 workers over 1, each row also made and written; the same file
  counts as 12 studies, start-up is excluded, best of 3. Where other programs keep the processors busy, only
  ``scaling_2_workers_cpu`` says something: the same ratio from processor seconds.
* native: size and reading time of a row that holds the whole resampled volume (``--store native``).

The last line is one JSON object.

    python benchmarks/prepro.py [--rounds 3] [--only speed]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import MIN_ROUNDS, run_fresh

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
Subject = Callable[[str], dict[str, Any]]


def measure_speed(run: Subject) -> dict[str, Any]:
    """Seconds of both paths, of the parts of ours, and the largest difference of the results."""
    found = run("speed")
    for name, seconds in found["rounds_s"].items():
        print(f"{name:16s} rounds: {', '.join(f'{each:.2f}' for each in seconds)} s")
    for part, seconds in found["parts_s"].items():
        print(f"{part:16s} {seconds:7.3f} s")
    keys = ("throughput_ratio", "throughput_ratio_cpu", "ours_s", "straightforward_s", "gzip_ratio")
    parts = {part: round(seconds, 4) for part, seconds in found["parts_s"].items()}
    return {key: round(found[key], 3) for key in keys} | {"max_abs_diff": found["max_abs_diff"], "parts_s": parts}


def measure_memory(run: Subject) -> dict[str, Any]:
    """Peak memory beyond imports over the stored voxels, for both stores."""
    result = {}
    for subject, key in (("memory", "rss_ratio"), ("memory_native", "rss_ratio_native")):
        found = run(subject)
        print(f"{subject:16s} {found['beyond_imports_gib']:.3f} GiB beyond imports for {found['raw_gib']:.3f} GiB")
        result[key] = round(found["beyond_imports_gib"] / found["raw_gib"], 3)
    return result


def measure_scaling(run: Subject) -> dict[str, Any]:
    """Rows per second with two workers over one; by processor time, two of them work twice as much in a second."""
    found = run("scaling")
    best = {kind: {w: min(s) for w, s in seconds.items()} for kind, seconds in found["seconds"].items()}
    for workers, seconds in found["seconds"]["wall"].items():
        shown = ", ".join(f"{each:.2f}" for each in seconds)
        cpu = best["cpu"][workers]
        print(f"{workers} worker(s)      {shown} s for {found['volumes']} studies, {cpu:.2f} s of processors")
    wall, cpu = best["wall"], best["cpu"]
    return {
        "scaling_2_workers": round(wall["1"] / wall["2"], 3),
        "scaling_2_workers_cpu": round(2 * cpu["1"] / cpu["2"], 3),
        "rows_per_s_2_workers": round(found["volumes"] / wall["2"], 2),
    }


def measure_native(run: Subject) -> dict[str, Any]:
    """Bytes and reading time of native rows."""
    found = run("native")
    for store, seconds in found["read_s"].items():
        print(
            f"{store:16s} {found['bytes'][store] / 2**20:6.1f} MiB a row, read for the model in {1000 * seconds:.1f} ms"
        )
    raw = found["raw_bytes"]
    print(f"a native row is {raw / found['bytes']['native']:.1f} times smaller than the stored study")
    return {
        "native_compression": round(found["native_voxel_bytes"] / found["bytes"]["native"], 2),
        "native_over_crop_bytes": round(found["bytes"]["native"] / found["bytes"]["crop"], 1),
        "native_pack_s": round(found["pack_s"], 3),
        "native_read_ms": round(1000 * found["read_s"]["native"], 1),
        "crop_read_ms": round(1000 * found["read_s"]["crop"], 1),
    }


SUBJECTS = {"speed": measure_speed, "memory": measure_memory, "scaling": measure_scaling, "native": measure_native}


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="interleaved rounds, at least 3")
    parser.add_argument("--slices", type=int, default=300, help="of the study; fewer for a smoke test")
    parser.add_argument("--only", choices=SUBJECTS, action="append", help="measure this only; may be repeated")
    options = parser.parse_args()
    rounds = max(options.rounds, MIN_ROUNDS)
    result: dict[str, Any] = {"shape_xyz": [512, 512, options.slices], "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study.nii.gz"
        run_fresh("prepro_subjects", {"subject": "write", "study": study, "slices": options.slices}, ONE_THREAD)

        def run(subject: str) -> dict[str, Any]:
            return run_fresh("prepro_subjects", {"subject": subject, "study": study, "rounds": rounds}, ONE_THREAD)

        for name, measure in SUBJECTS.items():
            if options.only is None or name in options.only:
                result |= measure(run)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
