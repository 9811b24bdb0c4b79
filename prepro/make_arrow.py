"""The one writer: cases in, one Arrow file and one manifest per split out, all of them or none.

A file is written under a temporary name in its own folder, one row per record batch, synced, and renamed when every
split is complete, so a run that dies leaves the files of the run before. Rows keep the order of the cases whatever
the number of workers; at most two scans per worker are in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

import mg3d
from mg3d.datasets.arrow_schema import FORMAT_VERSION, make_row_batch, make_schema
from mg3d.datasets.report_text import split_fragments
from mg3d.errors import DataError, EnvironmentProblem
from mg3d.scans.geometry import Geometry
from mg3d.training.run_folder import sync_directory
from prepro.engines import Failure, create_engine, load_in_order
from prepro.readers.base import Case, Exclusion, PackedImage, Reader
from prepro.splits import SPLITS, overlaps, refuse_overlaps

MAX_LISTED_OVERLAPS = 100
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackOptions:
    """How a run packs.

    Attributes:
        out: folder of the arrows and manifests.
        geometry: the grid of every row, for the schema metadata.
        workers: processes that read scans; 1 reads in this process.
        on_bad: ``skip`` counts and lists scans that cannot be used, ``stop`` ends the run at the first.
        clean: refuse equal volumes in two splits instead of reporting them.
        caption_separator: text between findings and impression in the caption.
        config: everything else worth recording in the manifest.
    """

    out: Path
    geometry: Geometry
    workers: int = 1
    on_bad: str = "skip"
    clean: bool = True
    caption_separator: str = " "
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class PackSummary:
    """What a run wrote.

    Attributes:
        rows: rows per split.
        excluded: scans left out for a stated reason before reading.
        failed: scans that could not be read.
        warned: packed scans with a warning in the manifest.
        files: arrow file per split.
    """

    rows: dict[str, int]
    excluded: int
    failed: int
    warned: int
    files: dict[str, str]


class ArrowFileWriter:
    """One Arrow IPC file that appears under its name only when it is complete.

    Args:
        path: the final name.
        schema: from :func:`mg3d.datasets.arrow_schema.make_schema`.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.rows = 0
        self._digest = hashlib.sha256()
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._writer = pa.ipc.new_file(pa.PythonFile(self, mode="w"), schema)

    closed = False

    def write(self, data: Any) -> int:
        """Take bytes from Arrow: hash them and pass them on."""
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Push buffered bytes to the file."""
        self._file.flush()

    def close(self) -> None:
        """Arrow closes its sink through this name; the file itself is closed by :meth:`finish`."""

    def add(self, batch: pa.RecordBatch) -> None:
        """Append one row.

        Args:
            batch: one-row batch of the schema.
        """
        self._writer.write_batch(batch)
        self.rows += 1

    def finish(self) -> tuple[str, int]:
        """Complete and sync the temporary file.

        Returns:
            sha256 and size in bytes of the whole file.
        """
        self._writer.close()
        size = self._file.tell()
        _sync_and_close(self._file)
        return self._digest.hexdigest(), size

    def publish(self) -> None:
        """Give the finished file its final name."""
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Remove the temporary file; harmless after :meth:`publish`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def pack(reader: Reader, cases: list[Case], exclusions: list[Exclusion], options: PackOptions) -> PackSummary:
    """Read every case and write the three arrows of a corpus with their manifests.

    Args:
        reader: loads the voxels of a case.
        cases: cases with splits, in the order of the rows.
        exclusions: what was left out already, for the manifests.
        options: how to pack.

    Returns:
        counts and file names.

    Raises:
        DataError: an unusable scan under ``stop``, equal volumes in two splits under ``clean``, or nothing to write.
        EnvironmentProblem: the disk cannot hold the result.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    _check_free_space(reader, cases, options)
    schema = make_schema(
        geometry=options.geometry.metadata(), window_hu=reader.window, label_names=list(reader.label_names)
    )
    writers: dict[str, ArrowFileWriter] = {}
    try:
        for split in SPLITS:
            writers[split] = ArrowFileWriter(options.out / f"{reader.corpus}_{split}.arrow", schema)
        log = _write_rows(reader, cases, options, schema, writers)
        if not any(writer.rows for writer in writers.values()):
            reasons = [item.reason for item in (*log.failures, *exclusions)]
            raise DataError("no scan could be packed", f"first reason: {reasons[0]}" if reasons else "check the root")
        shared = overlaps((row["image_sha256"], split, row["image_id"]) for split, row in log.all_rows())
        if options.clean:
            refuse_overlaps(shared, "volumes with equal content")
        manifests = _manifests(reader, writers, log, exclusions, shared, options)
        _publish(writers, manifests)
    finally:
        for writer in writers.values():
            writer.discard()
    rows = {split: writer.rows for split, writer in writers.items()}
    files = {split: str(writer.path) for split, writer in writers.items()}
    warned = sum(bool(row["warnings"]) for _, row in log.all_rows())
    return PackSummary(rows, len(exclusions), len(log.failures), warned, files)


@dataclass
class _Log:
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    failures: list[Exclusion] = field(default_factory=list)

    def all_rows(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return ((split, row) for split, rows in self.rows.items() for row in rows)


def _write_rows(
    reader: Reader, cases: list[Case], options: PackOptions, schema: pa.Schema, writers: Mapping[str, ArrowFileWriter]
) -> _Log:
    log = _Log()
    with tqdm(total=len(cases), desc=reader.corpus, unit="scan", dynamic_ncols=True) as bar:
        for case, result in load_in_order(reader, cases, create_engine(options.workers)):
            if isinstance(result, Failure):
                if options.on_bad == "stop":
                    raise DataError(result.message, result.remedy, case_id=case.image_id, path=result.path)
                log.failures.append(Exclusion(case.image_id, str(case.source[0]), result.message))
                logger.warning("%s left out: %s", case.image_id, result.message)
            else:
                for split in case.splits:
                    batch = _row(schema, reader.corpus, case, split, result, options.caption_separator)
                    writers[split].add(batch)
                    log.rows[split].append(_row_record(case, result, batch))
            bar.set_postfix(failed=len(log.failures), refresh=False)
            bar.update()
    return log


def _row(schema: pa.Schema, corpus: str, case: Case, split: str, packed: PackedImage, separator: str) -> pa.RecordBatch:
    return make_row_batch(
        schema,
        image=packed.voxels,
        image_id=case.image_id,
        patient_id=case.patient_id,
        corpus=corpus,
        split=split,
        findings=case.findings,
        impression=case.impression,
        findings_sen=split_fragments(case.findings),
        impression_sen=split_fragments(case.impression),
        spacing_mm=packed.spacing_mm,
        labels=case.labels,
        caption=separator.join(text for text in (case.findings, case.impression) if text),
    )


def _row_record(case: Case, packed: PackedImage, batch: pa.RecordBatch) -> dict[str, Any]:
    return {
        "image_id": case.image_id,
        "patient_id": case.patient_id,
        "image_sha256": hashlib.sha256(packed.voxels.tobytes()).hexdigest(),
        "row_crc32": batch.column("row_crc32")[0].as_py(),
        **packed.record,
        "warnings": list(packed.warnings),
    }


def _manifests(
    reader: Reader,
    writers: Mapping[str, ArrowFileWriter],
    log: _Log,
    exclusions: list[Exclusion],
    shared: list[str],
    options: PackOptions,
) -> dict[Path, dict[str, Any]]:
    manifests = {}
    left_out = [asdict(item) for item in (*exclusions, *log.failures)]
    code = {"mg3d": mg3d.__version__, "format": FORMAT_VERSION, "commit": _commit()}
    for split, writer in writers.items():
        digest, size = writer.finish()
        rows = log.rows[split]
        lines = "".join(f"{row['image_id']} {row['image_sha256']} {row['row_crc32']}\n" for row in rows)
        manifests[writer.path.with_suffix(".manifest.json")] = {
            "corpus": reader.corpus,
            "split": split,
            "file": writer.path.name,
            "rows": writer.rows,
            "bytes": size,
            "sha256": digest,
            "rows_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "code": code,
            "config": dict(options.config) | {"geometry": options.geometry.metadata()},
            "exclusions": left_out,
            "duplicates": _duplicates(rows),
            "shared_between_splits": {"count": len(shared), "pairs": shared[:MAX_LISTED_OVERLAPS]},
            "cases": rows,
        }
    return manifests


def _duplicates(rows: list[dict[str, Any]]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[row["image_sha256"]].append(row["image_id"])
    return [names for names in groups.values() if len(names) > 1]


def _publish(writers: Mapping[str, ArrowFileWriter], manifests: Mapping[Path, dict[str, Any]]) -> None:
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in manifests}
    try:
        for path, content in manifests.items():
            with temporaries[path].open("w", encoding="utf-8") as handle:
                json.dump(content, handle, indent=1, sort_keys=True)
                _sync_and_close(handle)
        for writer in writers.values():
            writer.publish()
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    sync_directory(next(iter(manifests)).parent)


def _sync_and_close(handle: Any) -> None:
    handle.flush()
    os.fsync(handle.fileno())
    handle.close()


def _check_free_space(reader: Reader, cases: list[Case], options: PackOptions) -> None:
    depth, height, width = options.geometry.size
    voxel_bytes = 1 if reader.window == "grey8" else 2
    needed = sum(len(case.splits) for case in cases) * depth * height * width * voxel_bytes
    free = shutil.disk_usage(options.out).free
    if needed > free:
        raise EnvironmentProblem(
            f"{options.out} has {free / 2**30:.1f} GiB free, the rows need {needed / 2**30:.1f} GiB",
            "free some space or choose another --out",
        )


def _commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()
