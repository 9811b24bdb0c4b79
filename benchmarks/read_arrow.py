"""Time of reading packed volumes through the dataset's row access, against reading the same bytes from a raw file.

Both turn stored voxels into float32 tensors in [0, 1]; file caches are warm. The readers take turns volume by volume,
every volume counts with its fastest round, and the ratio is that of the sums. The last line is one JSON object;
``read_ratio`` includes the row checksum, which training verifies by default.

    python benchmarks/read_arrow.py [--rows 16] [--rounds 10] [--dtype int16]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mg3d.datasets.arrow_schema import make_row_batch, make_schema
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.report_text import split_fragments
from mg3d.datasets.volume import CROP_FRACTIONS_DHW, PRETRAIN_SIZE_DHW, TARGET_SPACING_MM, to_unit_range

FINDINGS = "The thorax is symmetrical, both lungs show clear texture, no abnormal density. " * 8
IMPRESSION = "Nodule in the right upper lobe, follow-up is advised."


def write_files(folder: Path, rows: int, dtype: str) -> tuple[Path, Path]:
    """Write the same volumes as a packed file and as a raw file; return both paths."""
    geometry = {"crop_fractions": CROP_FRACTIONS_DHW, "size": PRETRAIN_SIZE_DHW, "store": "crop"}
    schema = make_schema(geometry={**geometry, "target_spacing_mm": TARGET_SPACING_MM})
    packed, raw = folder / "rows.arrow", folder / "rows.raw"
    rng = np.random.default_rng(0)
    low, high = (0, 256) if dtype == "uint8" else (-1000, 1001)
    with pa.OSFile(str(packed), "wb") as sink, pa.ipc.new_file(sink, schema) as writer, raw.open("wb") as plain:
        for number in range(rows):
            image = rng.integers(low, high, size=PRETRAIN_SIZE_DHW).astype(dtype)
            plain.write(image.tobytes())
            batch = make_row_batch(
                schema,
                image=image,
                image_id=f"scan_{number}",
                patient_id=f"patient_{number}",
                corpus="clm_ct_rate",
                split="train",
                findings=FINDINGS,
                impression=IMPRESSION,
                findings_sen=split_fragments(FINDINGS),
                impression_sen=split_fragments(IMPRESSION),
                spacing_mm=TARGET_SPACING_MM,
                labels=[0] * 18,
            )
            writer.write_batch(batch)
    return packed, raw


def packed_reader(path: Path, *, verify_crc: bool) -> Callable[[int], torch.Tensor]:
    """Return a function that reads one row through the table, as a training sample does."""
    table = ArrowTable([path], verify_crc=verify_crc)
    return lambda row: torch.from_numpy(to_unit_range(table.row(row)["image"]))


def raw_reader(path: Path, dtype: str) -> Callable[[int], torch.Tensor]:
    """Return a function that reads one volume from the raw file with plain numpy."""
    count = int(np.prod(PRETRAIN_SIZE_DHW))
    step = count * np.dtype(dtype).itemsize

    def read(row: int) -> torch.Tensor:
        stored = np.fromfile(path, dtype=dtype, count=count, offset=row * step).reshape(PRETRAIN_SIZE_DHW)
        return torch.from_numpy(to_unit_range(stored))

    return read


def fastest(readers: dict[str, Callable[[int], torch.Tensor]], rows: int, rounds: int) -> dict[str, float]:
    """Return seconds per reader: the sum over volumes of the fastest round; checks that all read the same."""
    best = {name: np.full(rows, np.inf) for name in readers}
    for number in range(rounds):
        for row in range(rows):
            tensors = []
            for name, reader in readers.items():
                start = time.perf_counter()
                tensors.append(reader(row))
                best[name][row] = min(best[name][row], time.perf_counter() - start)
            if number == 0 and not all(torch.equal(tensors[0], other) for other in tensors[1:]):
                raise SystemExit(f"the readers disagree about volume {row}")
    return {name: float(times.sum()) for name, times in best.items()}


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16, help="volumes of 128 x 96 x 128 voxels")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds, at least 3")
    parser.add_argument("--dtype", choices=["int16", "uint8"], default="int16", help="stored type")
    options = parser.parse_args()
    rounds = max(options.rounds, 3)
    with tempfile.TemporaryDirectory() as folder:
        packed, raw = write_files(Path(folder), options.rows, options.dtype)
        readers = {
            "raw": raw_reader(raw, options.dtype),
            "arrow": packed_reader(packed, verify_crc=True),
            "arrow_no_crc": packed_reader(packed, verify_crc=False),
        }
        best = fastest(readers, options.rows, rounds)
    for name, value in best.items():
        print(f"{name:13s} {1000 * value / options.rows:7.2f} ms a volume (best of {rounds})")
    result = {
        "read_ratio": round(best["arrow"] / best["raw"], 3),
        "read_ratio_no_crc": round(best["arrow_no_crc"] / best["raw"], 3),
        "arrow_s": round(best["arrow"], 4),
        "raw_s": round(best["raw"], 4),
        "rows": options.rows,
        "rounds": rounds,
        "dtype": options.dtype,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
