"""The Arrow row of this project: columns, metadata, checksums, and the check that a file follows them.

One record batch holds one row, in the Arrow IPC *file* format, so that a reader can map any row and leave the rest.
The published files (no pixels or a list of encoded slices, no checksums) are recognised too: spec pretraining 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32  # the same sum as zlib's, ten times as fast

from mg3d.datasets.labels import CT_RATE_LABELS, UNKNOWN_LABEL
from mg3d.datasets.volume import WINDOW_HU
from mg3d.errors import DataError

INT16: Final = np.iinfo(np.int16)
FORMAT_VERSION: Final = "1"
AXIS_ORDER: Final = "DHW=LPS(z,y,x)"
WINDOW_GREY_TEXT: Final = "grey8"
IMAGE_DTYPES: Final[Mapping[str, np.dtype]] = {"int16": np.dtype("<i2"), "uint8": np.dtype("u1")}
SPLITS: Final = ("train", "val", "test")

FIELDS: Final[tuple[pa.Field, ...]] = (
    pa.field("image", pa.large_binary()),
    pa.field("image_shape", pa.list_(pa.int32())),
    pa.field("image_dtype", pa.string()),
    pa.field("image_crc32", pa.uint32()),
    pa.field("row_crc32", pa.uint32()),
    pa.field("image_id", pa.string()),
    pa.field("patient_id", pa.string()),
    pa.field("corpus", pa.string()),
    pa.field("caption", pa.list_(pa.string())),
    pa.field("findings", pa.list_(pa.string())),
    pa.field("impression", pa.list_(pa.string())),
    pa.field("findings_sen", pa.list_(pa.string())),
    pa.field("impression_sen", pa.list_(pa.string())),
    pa.field("split", pa.string()),
    pa.field("labels", pa.list_(pa.int8())),
    pa.field("spacing_mm", pa.list_(pa.float32())),
)
PUBLISHED_COLUMNS: Final = ("image_id", "caption", "findings", "impression", "findings_sen", "impression_sen", "split")
METADATA_KEYS: Final = tuple(
    f"mg3d.{name}" for name in ("format_version", "geometry", "axis_order", "window_hu", "spacing_mm", "label_names")
)
Layout = Literal["mg3d", "published"]


def window_text(window_hu: Sequence[int]) -> str:
    """Return a window as the schema metadata hold it, for example ``[-1000,1000]``."""
    return json.dumps([int(limit) for limit in window_hu], separators=(",", ":"))


def parse_window(text: str, *, path: str = "") -> tuple[int, int] | None:
    """Return the window that the schema metadata name.

    Args:
        text: ``mg3d.window_hu``.
        path: name of the file, for the message.

    Returns:
        lower and upper limit in HU; None for 8-bit grey.

    Raises:
        DataError: neither two whole numbers of 16 bits, the lower first, nor ``grey8``.
    """
    if text == WINDOW_GREY_TEXT:
        return None
    try:
        low, high = json.loads(text)
    except (ValueError, TypeError):
        low = high = None
    if not (type(low) is int and type(high) is int and INT16.min <= low < high <= INT16.max):
        raise DataError(f"intensity window {text[:40]!r} is no window", "pack the file again with prepro", path=path)
    return low, high


def make_schema(
    *,
    geometry: Mapping[str, Any],
    window_hu: str = window_text(WINDOW_HU),
    spacing_mm: Sequence[float] | None = None,
    label_names: Sequence[str] = CT_RATE_LABELS,
) -> pa.Schema:
    """Return the schema every file is written with.

    Args:
        geometry: ``crop_fractions`` (D, H, W), ``size`` (D, H, W), ``target_spacing_mm`` (z, y, x) and ``store``.
        window_hu: the intensity window the voxels are mapped through: ``[-1000,1000]`` (HU) or ``grey8``.
        spacing_mm: nominal spacing (z, y, x) when all rows share one; None when each row has its own.
        label_names: names of the label columns, in order.
    """
    metadata = {
        "mg3d.format_version": FORMAT_VERSION,
        "mg3d.geometry": json.dumps(dict(geometry), sort_keys=True),
        "mg3d.axis_order": AXIS_ORDER,
        "mg3d.window_hu": window_hu,
        "mg3d.spacing_mm": json.dumps("per_row" if spacing_mm is None else [float(s) for s in spacing_mm]),
        "mg3d.label_names": json.dumps(list(label_names)),
    }
    return pa.schema(FIELDS, metadata=metadata)


def row_checksum(image: bytes | memoryview, columns: Mapping[str, Any]) -> int:
    """Return the crc32 of the image bytes followed by the canonical JSON of all other columns.

    Args:
        image: the stored bytes of the volume.
        columns: every column but ``image`` and ``row_crc32`` as plain Python values (keys sorted before hashing).
    """
    return _finish_checksum(crc32(image), columns)


def _finish_checksum(image_crc: int, columns: Mapping[str, Any]) -> int:
    others = {name: columns[name] for name in columns if name not in ("image", "row_crc32")}
    text = json.dumps(others, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return crc32(text.encode("ascii"), image_crc)


def make_row_batch(
    schema: pa.Schema,
    *,
    image: np.ndarray,
    image_id: str,
    patient_id: str,
    corpus: str,
    split: str,
    findings: str,
    impression: str,
    findings_sen: Sequence[str],
    impression_sen: Sequence[str],
    spacing_mm: Sequence[float],
    labels: Sequence[int] = (),
    caption: str | None = None,
) -> pa.RecordBatch:
    """Return one row as a record batch, with both checksums.

    Args:
        schema: the result of :func:`make_schema`.
        image: volume ``[D, H, W]``, int16 (HU) or uint8 (grey), canonical axis order.
        image_id: path or name of the scan; unique within the corpus.
        patient_id: identifier that keeps one patient in one split.
        corpus: ``clm_ct_rate`` or ``clm_chest_ctrg``.
        split: train, val or test.
        findings: cleaned findings text, may be empty.
        impression: cleaned impression text, may be empty.
        findings_sen: comma fragments of the findings.
        impression_sen: comma fragments of the impression.
        spacing_mm: spacing (z, y, x) of the STORED grid.
        labels: 0 / 1 / -1 (unknown) per label name; empty when the corpus has none.
        caption: whole text; the two sections without separator when not given (published layout).

    Raises:
        ValueError: an argument does not fit the schema.
    """
    _check_row(image, split, spacing_mm, labels)
    stored = np.ascontiguousarray(image, dtype=IMAGE_DTYPES[image.dtype.name])
    data = stored.tobytes()
    image_crc = crc32(data)
    row: dict[str, Any] = {
        "image_shape": [int(size) for size in image.shape],
        "image_dtype": image.dtype.name,
        "image_crc32": image_crc,
        "image_id": image_id,
        "patient_id": patient_id,
        "corpus": corpus,
        "caption": [findings + impression if caption is None else caption],
        "findings": [findings],
        "impression": [impression],
        "findings_sen": list(findings_sen),
        "impression_sen": list(impression_sen),
        "split": split,
        "labels": [int(label) for label in labels],
        "spacing_mm": [float(np.float32(value)) for value in spacing_mm],
    }
    row["row_crc32"] = _finish_checksum(image_crc, row)
    row["image"] = data
    return pa.record_batch([pa.array([row[field.name]], type=field.type) for field in schema], schema=schema)


def _check_row(image: np.ndarray, split: str, spacing_mm: Sequence[float], labels: Sequence[int]) -> None:
    if image.ndim != 3 or image.dtype.name not in IMAGE_DTYPES:
        raise ValueError(f"image must be [D, H, W] of {sorted(IMAGE_DTYPES)}, got {image.dtype} {image.shape}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if len(spacing_mm) != 3 or not all(np.isfinite(value) and value > 0 for value in spacing_mm):
        raise ValueError(f"spacing_mm must be three positive numbers (z, y, x), got {list(spacing_mm)}")
    if len(labels) and any(label not in (0, 1, UNKNOWN_LABEL) for label in labels):
        raise ValueError(f"labels must be 0, 1 or {UNKNOWN_LABEL} (unknown), got {list(labels)}")


def check_schema(schema: pa.Schema, *, path: str) -> Layout:
    """Return which layout a file has, after checking every column it needs.

    Args:
        schema: the schema read from the file.
        path: name of the file, for the message.

    Raises:
        DataError: a column is missing or has another type, a metadata key is missing, or the format is newer.
        ValueError: the metadata is no text or no JSON.
    """
    metadata = schema.metadata or {}
    if b"mg3d.format_version" not in metadata and "image_shape" not in schema.names:
        _check_published(schema, path)
        return "published"
    missing = [field.name for field in FIELDS if field.name not in schema.names]
    if missing:
        raise DataError(f"column {', '.join(missing)} is missing", "pack the file again with prepro", path=path)
    for field in FIELDS:
        found = schema.field(field.name).type
        if not _same_type(found, field.type):
            raise DataError(
                f"column {field.name} has type {found}, expected {field.type}",
                "pack the file again with prepro",
                path=path,
            )
    _check_metadata(metadata, path)
    return "mg3d"


def _check_metadata(metadata: Mapping[bytes, bytes], path: str) -> None:
    absent = [key for key in METADATA_KEYS if key.encode() not in metadata]
    if absent:
        raise DataError(f"schema metadata {', '.join(absent)} is missing", "pack the file again with prepro", path=path)
    version = metadata[b"mg3d.format_version"].decode()
    if version != FORMAT_VERSION:
        raise DataError(
            f"format version {version}, this program reads version {FORMAT_VERSION}",
            "update the program, or pack the file again with this version",
            path=path,
        )
    json.loads(metadata[b"mg3d.geometry"])
    parse_window(metadata[b"mg3d.window_hu"].decode(), path=path)
    axis_order = metadata[b"mg3d.axis_order"].decode()
    if axis_order != AXIS_ORDER:
        raise DataError(f"axis order {axis_order}, expected {AXIS_ORDER}", "pack the file again with prepro", path=path)


def _check_published(schema: pa.Schema, path: str) -> None:
    missing = [name for name in PUBLISHED_COLUMNS if name not in schema.names]
    if missing:
        raise DataError(
            f"column {', '.join(missing)} is missing (columns: {', '.join(schema.names)})",
            "build the clm_* file with prepro/prepro_pretraining_data.py",
            path=path,
        )
    for name in PUBLISHED_COLUMNS:
        expected = pa.string() if name in ("image_id", "split") else pa.list_(pa.string())
        found = schema.field(name).type
        if not _same_type(found, expected):
            raise DataError(f"column {name} has type {found}, expected {expected}", "build the file again", path=path)


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Equal up to the 32 / 64 bit offset variants that different pandas and pyarrow versions write."""
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _same_type(found.value_type, expected.value_type)
    if pa.types.is_string(expected):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if pa.types.is_large_binary(expected):
        return pa.types.is_binary(found) or pa.types.is_large_binary(found)
    return found.equals(expected)
