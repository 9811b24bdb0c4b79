"""One subject of ``prepro.py`` in a process of its own: ``python -m benchmarks.prepro_subjects --subject NAME``.

The last line is one JSON object. Nothing here imports torch before the straightforward path needs it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa

from benchmarks.harness import Timing, interleave, memory_gib
from mg3d.datasets.arrow_schema import make_row_batch, make_schema
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.volume import PRETRAIN_SIZE_DHW, centre_crop, resize_trilinear, to_unit_range
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.read import read_scan
from prepro.arrow_writer import GrowingArrow
from prepro.engines import create_engine, load_in_order
from prepro.readers.base import Case, PackedImage
from prepro.readers.ct_rate import CtRateReader

SPACING_XYZ = (0.7, 0.7, 1.0)
TABLE_RESCALE = (1.0, -8192.0)  # as the second release lists it for volumes that hold HU already
SCALING_STUDIES = 12
WARM_UP_STUDIES = 8
REPEATS = 3


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Write the study: a body with lungs, a spine and vessels, CT noise, nothing outside the scanner's circle."""
    shape = (512, 512, options.slices)
    x, y = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape[:2]], indexing="ij")
    noise = np.random.default_rng(0).standard_normal((*shape[:2], 8), dtype=np.float32)
    voxels = np.empty(shape, dtype=np.int16, order="F")
    for index, z in enumerate(np.linspace(-1, 1, shape[2], dtype=np.float32)):
        plane = np.where((x / 0.85) ** 2 + (y / 0.62) ** 2 < 1, np.float32(40), np.float32(-1000))
        for side in (-0.4, 0.4):
            plane[((x - side) / 0.3) ** 2 + ((y + 0.05) / 0.45) ** 2 + (z / 0.95) ** 2 < 1] = -860
        plane[x**2 + (y - 0.4) ** 2 < 0.12**2] = 500
        plane += 60 * np.sin(9 * x + 5 * z) * np.cos(7 * y) * (plane > -500)
        grain = np.roll(noise[..., index % 8], 17 * index, axis=0)
        plane += 14 * (grain + np.roll(grain, 1, 0) + np.roll(grain, 1, 1))
        plane[x**2 + y**2 >= 1] = -1024
        voxels[..., index] = plane.clip(-1024, 3000)
    nib.save(nib.Nifti1Image(voxels, np.diag([-SPACING_XYZ[0], -SPACING_XYZ[1], SPACING_XYZ[2], 1.0])), options.study)
    return {"bytes": options.study.stat().st_size}


def straightforward(study: Path) -> np.ndarray:
    """The path that most scripts take: the CRC is never checked, the rescale never questioned; [D,H,W] in [0, 1]."""
    import torch
    from torch.nn import functional

    image = nib.load(study)
    values_xyz = np.clip(image.get_fdata(), -1000, 1000).astype(np.float32)
    volume = torch.from_numpy((values_xyz + 1000) / 2000).permute(2, 1, 0)[None, None]
    steps = zip(volume.shape[2:], image.header.get_zooms()[::-1], (1.5, 0.75, 0.75), strict=True)
    size = [int(count * (float(str(step)) / target)) for count, step, target in steps]
    resampled = functional.interpolate(volume, size=size, mode="trilinear")
    kept = [int(count * part) for count, part in zip(size, (0.88, 0.65625, 0.875), strict=True)]
    starts = [count // 2 - part // 2 for count, part in zip(size, kept, strict=True)]
    crop = resampled[..., *(slice(start, start + part) for start, part in zip(starts, kept, strict=True))]
    return functional.interpolate(crop, size=(128, 96, 128), mode="trilinear")[0, 0].numpy()


def _reader(store: str = "crop") -> CtRateReader:
    return CtRateReader(Path(), Geometry(store=store))


def _case(study: Path, number: int = 0) -> Case:
    text = "The lungs are clear, no nodule. Heart size is normal."
    return Case(f"study_{number}", f"patient_{number}", "train", (study,), text, text, rescale=TABLE_RESCALE)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Both paths in turns, the parts of ours, and the largest difference before rounding."""
    import torch

    torch.set_num_threads(1)
    reader, case = _reader(), _case(options.study)
    ours_hu = prepare_scan(read_scan(options.study), Geometry(), table_rescale=TABLE_RESCALE).voxels_hu
    difference = float(np.abs((ours_hu + 1000) / 2000 - straightforward(options.study)).max())
    subjects = {"ours": lambda: reader.load(case), "straightforward": lambda: straightforward(options.study)}
    timings = interleave(subjects, options.rounds)
    wall, cpu = Timing.fastest(timings, "wall"), Timing.fastest(timings, "cpu")
    return {
        "throughput_ratio": wall["straightforward"] / wall["ours"],
        "throughput_ratio_cpu": cpu["straightforward"] / cpu["ours"],
        "ours_s": wall["ours"],
        "straightforward_s": wall["straightforward"],
        "rounds_s": {name: [each.wall for each in found] for name, found in timings.items()},
        "max_abs_diff": difference,
        "parts_s": _parts(options, case),
        "gzip_ratio": 2 * np.prod(nib.load(options.study).shape) / options.study.stat().st_size,
    }


def _parts(options: argparse.Namespace, case: Case) -> dict[str, float]:
    raw = read_scan(options.study)
    packed = _reader().load(case)
    target = options.study.with_name("row.arrow")
    subjects = {
        "read and inflate": lambda: read_scan(options.study),
        "resample": lambda: prepare_scan(raw, Geometry(), table_rescale=TABLE_RESCALE, dtype=np.int16),
        "write": lambda: _write_rows(target, [(case, packed)]),
    }
    return Timing.fastest(interleave(subjects, options.rounds), "wall")


def _write_rows(path: Path, rows: Any, store: str = "crop") -> None:
    schema = make_schema(geometry=Geometry(store=store).metadata())
    path.unlink(missing_ok=True)
    arrow = GrowingArrow(path, schema, "zstd" if store == "native" else None)
    for case, packed in rows:
        arrow.add(_row(schema, case, packed))
    arrow.finish()


def _row(schema: pa.Schema, case: Case, packed: PackedImage) -> pa.RecordBatch:
    return make_row_batch(
        schema,
        image=packed.voxels,
        image_id=case.image_id,
        patient_id=case.patient_id,
        corpus="clm_ct_rate",
        split="train",
        findings=case.findings,
        impression=case.impression,
        findings_sen=[case.findings],
        impression_sen=[case.impression],
        spacing_mm=packed.spacing_mm,
    )


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of packing the study once."""
    store = "native" if options.subject == "memory_native" else "crop"
    imported = memory_gib("VmRSS")
    packed = _reader(store).load(_case(options.study))
    beyond = memory_gib("VmHWM") - imported
    stored = 2 * np.prod(packed.record["stored_shape_DHW"])
    return {"beyond_imports_gib": beyond, "raw_gib": float(stored / 2**30)}


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the packing engine for the studies, with one worker and with two, in turns."""
    tiny = options.study.with_name("tiny.nii.gz")
    nib.save(nib.load(options.study).slicer[::16, ::16, :32], tiny)
    found: dict[int, list[Timing]] = {1: [], 2: []}
    for _ in range(REPEATS):
        for workers, timings in found.items():
            timings.append(_engine_time(options.study, tiny, workers))
    seconds = {
        kind: {w: [getattr(t, kind) for t in timings] for w, timings in found.items()} for kind in ("wall", "cpu")
    }
    return {"seconds": seconds, "volumes": SCALING_STUDIES}


class TimedReader(CtRateReader):
    """Notes the processor time of a scan in its record."""

    def load(self, case: Case) -> PackedImage:
        """Read one scan."""
        start = time.process_time()
        packed = super().load(case)
        packed.record["cpu_s"] = time.process_time() - start
        return packed


def _engine_time(study: Path, tiny: Path, workers: int) -> Timing:
    """Time from the first study handed to the engine, all workers being awake, to the last row written."""
    started: list[Timing] = []
    elsewhere_s = 0.0

    def now() -> Timing:
        return Timing(time.perf_counter(), time.process_time())

    def cases() -> Iterator[Case]:
        # the engine takes cases a few ahead of its results: by the last of these every worker has answered
        yield from (_case(tiny, number) for number in range(WARM_UP_STUDIES))
        started.append(now())
        yield from (_case(study, number) for number in range(WARM_UP_STUDIES, WARM_UP_STUDIES + SCALING_STUDIES))

    def checked() -> Iterator[tuple[Case, PackedImage]]:
        nonlocal elsewhere_s
        for case, packed in load_in_order(TimedReader(Path(), Geometry()), cases(), create_engine(workers)):
            if not isinstance(packed, PackedImage):
                raise SystemExit(f"{case.image_id}: {packed.message}")
            if workers > 1 and case.source[0] == study:
                elsewhere_s += packed.record["cpu_s"]
            yield case, packed

    _write_rows(study.with_name("rows.arrow"), checked())
    end = now()
    return Timing(end.wall - started[0].wall, end.cpu - started[0].cpu + elsewhere_s)


def native(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes of a row of each store, the seconds to make a native one, and to read each for the model."""
    sizes, read_s, pack_s, voxel_bytes = {}, {}, 0.0, 0
    for store in ("crop", "native"):
        path, case = options.study.with_name(f"{store}.arrow"), _case(options.study)
        packing = interleave({store: lambda store=store, case=case: _reader(store).load(case)}, options.rounds)
        pack_s = Timing.fastest(packing, "wall")[store]
        packed = _reader(store).load(case)
        voxel_bytes = packed.voxels.nbytes
        _write_rows(path, [(case, packed)], store)
        sizes[store] = path.stat().st_size
        reading = interleave({store: lambda path=path: _model_input(ArrowTable([path]))}, options.rounds)
        read_s[store] = Timing.fastest(reading, "wall")[store]
    raw = 2 * int(np.prod(packed.record["stored_shape_DHW"]))
    sizes_and_times = {"bytes": sizes, "read_s": read_s, "pack_s": pack_s}
    return sizes_and_times | {"raw_bytes": raw, "native_voxel_bytes": voxel_bytes}


def _model_input(table: ArrowTable) -> np.ndarray:
    """What a training sample makes of a row: checked, cropped where needed, resized; [D,H,W] in [0, 1]."""
    image = table.row(0)["image"]
    if image.shape == PRETRAIN_SIZE_DHW:
        return to_unit_range(image)
    return resize_trilinear(to_unit_range(centre_crop(image, Geometry.crop_fractions)), PRETRAIN_SIZE_DHW)


SUBJECTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "write": write,
    "speed": speed,
    "memory": memory,
    "memory_native": memory,
    "scaling": scaling,
    "native": native,
}


def main() -> None:
    """Run the subject named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=SUBJECTS, required=True)
    parser.add_argument("--study", type=Path, required=True, help="file to write or read")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(SUBJECTS[options.subject](options)))


if __name__ == "__main__":
    main()
