"""One packed file: its bytes against the manifest, every row against its checksum, the schema and common sense.

Rows are read one by one and dropped; of each only its names and the digest of its voxels are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa

from mg3d.datasets.arrow_table import ArrowTable
from mg3d.errors import DataError
from prepro.verification.file_digest import Advance, FileDigest, ignore_progress
from prepro.verification.findings import Finding, bare_message, finding
from prepro.verification.manifests import Comparison, read_manifest
from prepro.verification.rows import FileContext, check_row, is_empty_report

FILE_NAME: Final = re.compile(r"(?P<corpus>.+)_(?P<split>train|val|test)(?:-\d{5}-of-\d{5})?\.arrow")
CT_RATE_NAME: Final = re.compile(r"(?P<study>(?P<patient>[A-Za-z]+_\d+)_[A-Za-z]+)_\d+")
VOLUME_SUFFIXES: Final = (".npz", ".gz", ".nii")
RELEASE_BYTES: Final = 1 << 23


class RowFacts(NamedTuple):
    """What is kept of a row to compare it with all others; ``digest`` is empty for rows without voxels."""

    image_id: str
    patient_id: str
    study: str
    digest: bytes


@dataclass
class ArrowResult:
    """What the check of one file found.

    Attributes:
        path: the file.
        corpus: corpus its name says.
        split: split its name says, otherwise that of its rows.
        rows: rows the file claims to hold.
        empty_reports: rows without text.
        protocol: split protocol of the manifest; ``clean`` where none is recorded.
        metadata: schema metadata as text, to compare files with each other.
        findings: everything wrong with it.
        facts: one entry per readable row.
    """

    path: str
    corpus: str = ""
    split: str = ""
    rows: int = 0
    empty_reports: int = 0
    protocol: str = "clean"
    metadata: str = ""
    findings: list[Finding] = field(default_factory=list)
    facts: list[RowFacts] = field(default_factory=list)


def check_arrow(path: Path, advance: Advance = ignore_progress) -> ArrowResult:
    """Check one packed file.

    Args:
        path: the file.
        advance: told the number of bytes checked since it was told last.

    Returns:
        what was found; a file that cannot be opened is a finding, too.
    """
    result = ArrowResult(str(path))
    name = FILE_NAME.fullmatch(path.name)
    if name is None:
        result.findings.append(finding("name_unknown", path.name, path=str(path)))
    else:
        result.corpus, result.split = name["corpus"], name["split"]
    manifest, problems = read_manifest(path)
    result.findings += problems
    if manifest is not None:
        result.protocol = _config(manifest).get("split_protocol", "clean")
    try:
        _check_content(path, manifest, result, advance)
    except DataError as problem:
        code = _unreadable_code(problem, manifest)
        message = bare_message(problem) + ("" if code == "no_rows_expected" else _expected(manifest))
        result.findings.append(finding(code, message, path=str(path), remedy=problem.remedy))
    except OSError as problem:
        result.findings.append(finding("file_unreadable", f"reading fails ({problem})", path=str(path)))
    return result


def _config(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    config = manifest.get("config")
    return config if isinstance(config, dict) else {}


def _unreadable_code(problem: DataError, manifest: Mapping[str, Any] | None) -> str:
    if "holds no rows" not in problem.message:
        return "file_unreadable"
    return "no_rows_expected" if manifest is not None and manifest["rows"] == 0 else "no_rows"


def _expected(manifest: Mapping[str, Any] | None) -> str:
    return "" if manifest is None else f"; the manifest says {manifest['bytes']:,} bytes and {manifest['rows']} rows"


def _check_content(path: Path, manifest: Mapping[str, Any] | None, result: ArrowResult, advance: Advance) -> None:
    table = ArrowTable([path])
    comparison = Comparison(str(path), manifest, result.findings)
    whole = comparison.size(path.stat().st_size)
    result.rows = len(table)
    comparison.rows(len(table))
    context = _context(table, manifest, result)
    result.metadata = json.dumps(table.metadata, sort_keys=True)
    if context.published:
        result.findings.append(finding("published_layout", "checks without checksums only", path=str(path)))
    with FileDigest(path, advance) as digest:
        rows = _published_rows(path, digest) if context.published else _packed_rows(table, digest, result, comparison)
        for number, row in rows:
            result.findings.extend(check_row(row, number, context))
            same = comparison.row(number, row)
            result.facts.append(_facts(row, same))
            result.empty_reports += is_empty_report(row)
        total = digest.finish()
    if whole:
        comparison.digest(total)


def _context(table: ArrowTable, manifest: Mapping[str, Any] | None, result: ArrowResult) -> FileContext:
    if table.layout == "published":
        return FileContext(result.path, result.corpus, result.split)
    metadata = table.metadata
    try:
        geometry, names = json.loads(metadata["mg3d.geometry"]), json.loads(metadata["mg3d.label_names"])
    except ValueError as problem:
        raise DataError(f"schema metadata is no JSON ({problem})", "pack the file again with prepro") from problem
    keep = manifest is not None and _config(manifest).get("empty_report") == "keep"
    return FileContext(
        result.path, result.corpus, result.split, dict(geometry), metadata["mg3d.window_hu"], list(names), keep
    )


def _packed_rows(
    table: ArrowTable, digest: FileDigest, result: ArrowResult, comparison: Comparison
) -> Iterator[tuple[int, dict[str, Any]]]:
    released = 0
    for number in range(len(table)):
        digest.read_to((number + 1) / len(table))
        if digest.position - released > RELEASE_BYTES:
            table.release()
            released = digest.position
        try:
            row = table.row(number)
        except DataError as problem:
            result.findings.append(_damaged(problem, number, comparison))
            continue
        yield number, row


def _damaged(problem: DataError, number: int, comparison: Comparison) -> Finding:
    _, _, name = problem.path.partition(f"row {number} (")
    case = comparison.listed_id(number) or name.removesuffix(")")
    return finding(
        "row_damaged", bare_message(problem), path=comparison.path, row=number, case=case, remedy=problem.remedy
    )


def _published_rows(path: Path, digest: FileDigest) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            digest.read_to((index + 1) / reader.num_record_batches)
            batch = _valid_batch(reader, index)
            for offset in range(batch.num_rows):
                (row,) = batch.slice(offset, 1).to_pylist()
                yield number, row
                number += 1


def _valid_batch(reader: pa.ipc.RecordBatchFileReader, index: int) -> pa.RecordBatch:
    try:
        batch = reader.get_batch(index)
        batch.validate(full=True)
    except pa.ArrowException as problem:
        raise DataError(f"record batch {index} is damaged", "copy the file again, or build it again") from problem
    return batch


def _facts(row: Mapping[str, Any], known_sha256: str) -> RowFacts:
    image_id = str(row["image_id"] or "")
    stem = image_id.replace("\\", "/").rpartition("/")[2]
    for suffix in VOLUME_SUFFIXES:
        stem = stem.removesuffix(suffix)
    name = CT_RATE_NAME.fullmatch(stem)
    patient = str(row.get("patient_id") or (name["patient"] if name else image_id))
    return RowFacts(image_id, patient, name["study"] if name else "", _digest(row.get("image"), known_sha256))


def _digest(image: Any, known_sha256: str) -> bytes:
    if known_sha256:
        return bytes.fromhex(known_sha256)
    if image is None:
        return b""
    sha256 = hashlib.sha256()
    for part in image if isinstance(image, list) else [memoryview(image).cast("B")]:
        sha256.update(part)
    return sha256.digest()
