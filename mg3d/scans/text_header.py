"""Where the voxels of a NRRD or MetaImage file lie: its text header, read with suspicion.

Only the storage is read here (place, compression, byte order, which geometry fields exist); sizes and directions are
left to SimpleITK. Formats: teem's NRRD 5 description and the MetaIO description.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mg3d.errors import DataError
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

MAX_HEADER_BYTES = 1 << 16
ANATOMICAL_SPACES = (
    "left-posterior-superior",
    "lps",
    "right-anterior-superior",
    "ras",
    "left-anterior-superior",
    "las",
)
NRRD_ENCODINGS = {"raw": "raw", "gzip": "deflate", "gz": "deflate"}
NO_OR_SOME_VECTOR = re.compile(r"(none)|\(", re.IGNORECASE)  # captures only what is no vector
UNIT_WORDS = {
    "metres": {"m", "meter", "meters", "metre", "metres"},
    "micrometres": {"um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres"},
}
SAVE_PLAINLY = "save the volume again as one raw or gzip-compressed file"


@dataclass(frozen=True)
class VoxelStorage:
    """How the voxels of a text-headed file are stored.

    Attributes:
        data_path: file that holds the voxels.
        start: bytes before them (in ``data_path``); -1 counts back from the end of the file.
        encoding: ``raw`` or ``deflate`` (gzip or zlib wrapping).
        big_endian: byte order.
        oriented: the header states directions in the patient.
        has_spacing: the header states a voxel size.
        unit: a unit of length other than millimetres, as :func:`mg3d.scans.raw_volume.unit_in_mm` names it.
        warnings: what the header says and is not used.
    """

    data_path: Path
    start: int
    encoding: str
    big_endian: bool
    oriented: bool
    has_spacing: bool
    unit: str = ""
    warnings: tuple[str, ...] = ()


def nrrd_storage(block: bytes, path: Path) -> VoxelStorage:
    """Read the fields of a NRRD header.

    Args:
        block: the first 64 KiB of the file.
        path: ``.nrrd`` or ``.nhdr`` file.

    Returns:
        where and how the voxels are stored.

    Raises:
        DataError: not a NRRD header, an encoding without checksum-safe reading, or a data file in another folder.
    """
    if not block.startswith(b"NRRD000"):
        raise DataError(f"not a NRRD file (it starts with {block[:8]!r})", DOWNLOAD_AGAIN, path=str(path))
    fields: dict[str, str] = {}
    start = 0
    for line in block.splitlines(keepends=True):
        start += len(line)
        text = line.decode("utf-8", "replace").strip()
        if not text:
            break
        key, colon, value = text.partition(": ")
        if colon and not text.startswith("#"):
            fields[key.strip().lower().replace(" ", "")] = value.strip()
    else:
        if "datafile" not in fields:
            raise DataError("the header has no end", DOWNLOAD_AGAIN, path=str(path))
    encoding = NRRD_ENCODINGS.get(fields.get("encoding", "").lower())
    data_path, skip = path, _whole_number(fields, "byteskip", path)
    if encoding is None or fields.get("lineskip", "0") != "0" or (encoding != "raw" and skip):
        shown = ", ".join(f"{key} {fields[key]}" for key in ("encoding", "lineskip", "byteskip") if key in fields)
        raise DataError(f"unsupported storage ({shown})", SAVE_PLAINLY, path=str(path))
    if "datafile" in fields:
        data_path, start = _beside(path, fields["datafile"]), 0
    oriented = fields.get("space", "").lower() in ANATOMICAL_SPACES and "spacedirections" in fields
    has_spacing = "spacings" in fields or "spacedirections" in fields
    _check_sizes(fields, path)
    unit = _unit(fields.get("spaceunits") or fields.get("units", ""))
    unnamed = "spacedirections" in fields and not oriented
    said = (f"directions in the space {fields.get('space', '')!r}, which is not the patient's, are not used",)
    big_endian = fields.get("endian", "little").lower() == "big"
    place = -1 if skip < 0 else start + skip
    return VoxelStorage(data_path, place, encoding, big_endian, oriented, has_spacing, unit, said if unnamed else ())


def meta_storage(block: bytes, path: Path) -> VoxelStorage:
    """Read the fields of a MetaImage header.

    Args:
        block: the first 64 KiB of the file.
        path: ``.mha`` or ``.mhd`` file.

    Returns:
        where and how the voxels are stored.

    Raises:
        DataError: not a MetaImage header, voxels as text, or a data file in another folder.
    """
    fields: dict[str, str] = {}
    start = 0
    for line in block.splitlines(keepends=True):
        start += len(line)
        key, equals, value = line.decode("utf-8", "replace").partition("=")
        if not equals:
            break
        fields[key.strip().lower()] = value.strip()
        if key.strip().lower() == "elementdatafile":
            break
    if "dimsize" not in fields or "elementdatafile" not in fields:
        raise DataError(f"not a MetaImage header (it starts with {block[:8]!r})", DOWNLOAD_AGAIN, path=str(path))
    if fields.get("binarydata", "true").lower() != "true":
        raise DataError("voxels are stored as text", SAVE_PLAINLY, path=str(path))
    data_path, skip = path, _whole_number(fields, "headersize", path)
    if fields["elementdatafile"].upper() != "LOCAL":
        data_path, start = _beside(path, fields["elementdatafile"]), 0
    encoding = "deflate" if fields.get("compresseddata", "false").lower() == "true" else "raw"
    order = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "false"))
    oriented = not fields.keys().isdisjoint(("transformmatrix", "rotation", "orientation"))
    has_spacing = not fields.keys().isdisjoint(("elementspacing", "elementsize"))
    _check_sizes(fields, path)
    unit, place = _unit(fields.get("distanceunits", "")), -1 if skip < 0 else start + skip
    return VoxelStorage(data_path, place, encoding, order.lower() in ("true", "1"), oriented, has_spacing, unit)


def _check_sizes(fields: Mapping[str, str], path: Path) -> None:
    """Refuse voxel sizes that SimpleITK would replace by 1 or turn round in silence."""
    found = {key: fields[key].split()[:3] for key in ("spacings", "elementspacing", "elementsize") if key in fields}
    vectors = NO_OR_SOME_VECTOR.findall(fields.get("spacedirections", ""))
    if vectors and vectors.count("") < 3:
        found["spacedirections"] = vectors
    for key, words in found.items():
        if not all(re.fullmatch(r"\+?[\d.]+(e[+-]?\d+)?", word, re.IGNORECASE) for word in words):
            raise DataError(f"{key} {fields[key]!r} hold no voxel size", "repair the header spacing", path=str(path))


def _unit(text: str) -> str:
    """Metres or micrometres, where all of a header's unit words mean that; "" for millimetres and all else."""
    words = set(text.lower().replace('"', " ").split())
    return next((unit for unit, names in UNIT_WORDS.items() if words and words <= names), "")


def _whole_number(fields: Mapping[str, str], key: str, path: Path) -> int:
    try:
        number = int(fields.get(key, "0"))
    except ValueError:
        number = -2
    if number < -1:
        raise DataError(f"{key} {fields[key]!r} is no offset", SAVE_PLAINLY, path=str(path))
    return number


def _beside(path: Path, name: str) -> Path:
    """Return the data file a header names; only one plain file of the same folder is accepted."""
    if name.split()[0].upper() == "LIST" or "%" in name:
        raise DataError("the voxels are spread over several files", SAVE_PLAINLY, path=str(path))
    data_path = path.parent / name
    if Path(name).name != name or "\\" in name or data_path.resolve().parent != path.parent.resolve():
        remedy = "put the data file beside the header and name it without a folder"
        raise DataError(f"data file {name!r} lies outside the folder of its header", remedy, path=str(path))
    return data_path
