"""DICOM files byte by byte, so that a test can write what no library would."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

CT, ENHANCED_CT, CONVERTED_CT = (f"1.2.840.10008.5.1.4.1.1.2{end}" for end in ("", ".1", ".2"))
MR, NUCLEAR, SECONDARY = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("4", "20", "7"))
IMPLICIT, EXPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
LONG = (b"OB", b"OW", b"SQ", b"UN")
TYPES = {0x00080016: b"UI", 0x00080018: b"UI", 0x0020000D: b"UI", 0x0020000E: b"UI"} | {
    **dict.fromkeys((0x00280002, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103), b"US"),
    **dict.fromkeys((0x00080008, 0x00080060, 0x00280004, 0x00089007), b"CS"),
    **dict.fromkeys((0x0008103E, 0x00281054), b"LO"),
    **dict.fromkeys((0x00200011, 0x00200012, 0x00280008), b"IS"),
    **dict.fromkeys((0x00200032, 0x00200037, 0x00280030, 0x00281052, 0x00281053), b"DS"),
    0x00181210: b"SH",
    0x7FE00010: b"OW",
}
Value = str | int | bytes | Sequence["Tags"]
Tags = Mapping[int, "Value"]


def encode(tags: Tags, implicit: bool = False) -> bytes:
    """Data elements in order; lists are sequences."""
    return b"".join(_element(tag, value, implicit) for tag, value in sorted(tags.items()))


def _element(tag: int, value: Value, implicit: bool) -> bytes:
    kind = b"SQ" if isinstance(value, (list, tuple)) else TYPES.get(tag, b"UN")
    if isinstance(value, str):
        raw = value.encode()
        raw += (b"\0" if kind == b"UI" else b" ") * (len(raw) % 2)
    elif isinstance(value, int):
        raw = struct.pack("<H", value)
    elif isinstance(value, bytes):
        raw = value
    else:
        items = (encode(item, implicit) for item in value)
        raw = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<I", len(raw)) + raw
    if kind in LONG:
        return head + kind + struct.pack("<HI", 0, len(raw)) + raw
    return head + kind + struct.pack("<H", len(raw)) + raw


def whole_file(data: bytes, sop_class: str = CT, syntax: str = EXPLICIT) -> bytes:
    """A data set with preamble and file meta group."""
    meta = b"".join(
        struct.pack("<HH2sH", 2, element, b"UI", len(value)) + value
        for element, value in ((2, _uid(sop_class)), (3, _uid("1.2.3.4")), (0x10, _uid(syntax)))
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta + data


def _uid(value: str) -> bytes:
    raw = value.encode()
    return raw + b"\0" * (len(raw) % 2)


def image_tags(plane: np.ndarray) -> dict[int, Value]:
    """Tags of an image [rows, columns] or [frames, rows, columns] of HU, stored as uint16 with intercept -1024."""
    rows, columns = plane.shape[-2:]
    return {
        **{0x00080008: "ORIGINAL\\PRIMARY\\AXIAL", 0x00080016: CT, 0x00080060: "CT", 0x0020000D: "1.2.3"},
        **{0x0020000E: "1.2.3.9", 0x00200011: "4", 0x00280002: 1, 0x00280004: "MONOCHROME2"},
        **{0x00280010: rows, 0x00280011: columns, 0x00280100: 16, 0x00280101: 16, 0x00280102: 15, 0x00280103: 0},
        0x7FE00010: (plane.astype(np.int32) + 1024).astype("<u2").tobytes(),
    }


def slice_tags(plane: np.ndarray, height: float) -> dict[int, Value]:
    """Tags of a classic axial slice of 2 x 2.5 mm pixels."""
    return image_tags(plane) | {
        **{0x00080018: f"1.2.3.4.{round(height * 10) + 1}", 0x00200032: f"-10\\20\\{height:g}"},
        **{0x00200037: "1\\0\\0\\0\\1\\0", 0x00280030: "2.5\\2", 0x00281052: "-1024", 0x00281053: "1"},
    }


def save_slices(
    folder: Path,
    voxels_lps: np.ndarray,
    heights: Iterable[float],
    changes: Tags | None = None,
    *,
    implicit: bool = False,
    bare: Iterable[int] = (),
    sop_class: str = CT,
    syntax: str = "",
    start: str = "IM",
) -> list[Path]:
    """Write the planes of an LPS volume [X,Y,Z] as a series; those of ``bare`` without preamble and meta group."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, without = [], set(bare)
    for number, height in enumerate(heights):
        tags = slice_tags(voxels_lps[:, :, number].T, height) | {0x00080016: sop_class} | dict(changes or {})
        data = encode({tag: value for tag, value in tags.items() if value != ""}, implicit)
        path = folder / f"{start}{number:03d}.dcm"
        stated = syntax or (IMPLICIT if implicit else EXPLICIT)
        path.write_bytes(data if number in without else whole_file(data, sop_class, stated))
        paths.append(path)
    return paths


def save_enhanced(
    path: Path,
    voxels_lps: np.ndarray,
    heights: Sequence[float],
    changes: Tags | None = None,
    *,
    intercepts: Sequence[float] | None = None,
    sop_class: str = ENHANCED_CT,
    implicit: bool = False,
) -> Path:
    """Write an LPS volume [X,Y,Z] as one multi-frame file; the frames lie at ``heights``, in the order given."""
    intercepts = intercepts or [-1024.0] * len(heights)
    frames = [
        {
            0x00209113: [{0x00200032: f"-10\\20\\{height:g}"}],
            0x00289145: [{0x00281052: f"{intercept:g}", 0x00281053: "1", 0x00281054: "HU"}],
        }
        for height, intercept in zip(heights, intercepts, strict=True)
    ]
    stored = voxels_lps.transpose(2, 1, 0) - np.array(intercepts).reshape(-1, 1, 1) - 1024
    tags = image_tags(stored) | {
        **{0x00080016: sop_class, 0x00280008: str(len(frames)), 0x52009230: frames},
        0x52009229: [{0x00209116: [{0x00200037: "1\\0\\0\\0\\1\\0"}], 0x00289110: [{0x00280030: "2.5\\2"}]}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    data = encode(tags | dict(changes or {}), implicit)
    path.write_bytes(whole_file(data, sop_class, IMPLICIT if implicit else EXPLICIT))
    return path
