"""Packed rows for the tests of the verifier: changed after packing, with or without a new checksum."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mg3d.datasets.arrow_schema import make_row_batch, make_schema, row_checksum
from mg3d.datasets.report_text import split_fragments
from prepro.verify import main

GEOMETRY = {"crop_fractions": [1, 1, 1], "size": [8, 6, 10], "target_spacing_mm": [1.5, 0.75, 0.75], "store": "crop"}
SCHEMA = make_schema(geometry=GEOMETRY)


def packed_rows(
    count: int, *, first: int = 0, split: str = "train", schema: pa.Schema = SCHEMA
) -> list[pa.RecordBatch]:
    """Rows that pass every check, one patient each."""
    return [_row(number, split, schema) for number in range(first, first + count)]


def _row(number: int, split: str, schema: pa.Schema) -> pa.RecordBatch:
    findings, impression = f"The lungs are clear, no nodule. Heart size {number} is normal.", "Normal chest."
    rng = np.random.default_rng(number)
    return make_row_batch(
        schema,
        image=rng.choice([-950, -850, 40, 60], size=(8, 6, 10)).astype(np.int16),
        image_id=f"scan_{number}",
        patient_id=f"patient_{number}",
        corpus="clm_ct_rate",
        split=split,
        findings=findings,
        impression=impression,
        findings_sen=split_fragments(findings),
        impression_sen=split_fragments(impression),
        spacing_mm=(40.0, 50.0, 30.0),
        labels=[number % 2] * 18,
        caption=f"{findings} {impression}",
    )


def resign(batch: pa.RecordBatch, changes: dict[str, Any], *, sign: bool = True) -> pa.RecordBatch:
    """Change values of a row; ``sign`` gives it the checksum of its new content."""
    (row,) = batch.to_pylist()
    row |= changes
    if sign:
        row["row_crc32"] = row_checksum(row["image"], row)
    return pa.record_batch([pa.array([row[field.name]], field.type) for field in batch.schema], schema=batch.schema)


def write_rows(
    path: Path, batches: Sequence[pa.RecordBatch], *, manifest: bool = True, protocol: str = "clean"
) -> Path:
    """Write rows as a packed file, with a manifest that fits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = batches[0].schema if batches else SCHEMA
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    if manifest:
        data = path.read_bytes()
        content = {
            "file": path.name,
            "rows": len(batches),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "config": {"split_protocol": protocol},
            "cases": [_case(batch) for batch in batches],
        }
        path.with_suffix(".manifest.json").write_text(json.dumps(content))
    return path


def _case(batch: pa.RecordBatch) -> dict[str, Any]:
    (row,) = batch.to_pylist()
    digest = hashlib.sha256(row["image"] or b"").hexdigest()
    return {name: row[name] for name in ("image_id", "patient_id", "row_crc32")} | {"image_sha256": digest}


def run_verify(*arguments: object) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Run the command; return exit code, findings and the last line of standard output."""
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        report = Path(folder) / "report.json"
        code = main([*map(str, arguments), "--workers", "1", "--json", str(report)])
        findings = json.loads(report.read_text(encoding="utf-8"))["findings"]
    return code, findings, json.loads(out.getvalue().splitlines()[-1])


def codes(findings: list[dict[str, Any]]) -> set[str]:
    """Kinds of the findings."""
    return {item["code"] for item in findings}
