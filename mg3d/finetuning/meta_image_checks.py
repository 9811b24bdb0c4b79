"""Checks of downloaded MetaImage scans: header, size of the voxels, and on demand every byte."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mg3d.errors import DataError
from mg3d.finetuning.scan_checks import problem, problem_of

__all__ = ["check_meta_image"]

PACKED_BYTES = re.compile(rb"^CompressedDataSize\s*=\s*(\d+)", re.MULTILINE)


def check_meta_image(path: Path, *, full: bool = False) -> list[str]:
    """Problems of one ``.mhd`` or ``.mha`` file, each a line that names file and mend.

    Args:
        path: the file with the header.
        full: also read and decompress every voxel.
    """
    if not path.is_file():
        return [problem(path, "missing", "complete the download")]
    try:
        return _check(path, full)
    except DataError as error:
        return [problem_of(error)]


def _check(path: Path, full: bool) -> list[str]:
    from mg3d.scans.itk_image import read_information
    from mg3d.scans.read import read_scan
    from mg3d.scans.text_header import MAX_HEADER_BYTES, meta_storage

    with path.open("rb") as file:
        block = file.read(MAX_HEADER_BYTES)
    storage = meta_storage(block, path)
    if not storage.data_path.is_file():
        return [problem(storage.data_path, "missing, though its header is there", "download it again")]
    header = read_information(path, "MetaImageIO")
    promised = math.prod(header.size) * header.dtype.itemsize
    held = storage.data_path.stat().st_size - max(storage.start, 0)
    packed = PACKED_BYTES.search(block) if storage.encoding != "raw" else None
    if packed is not None:
        promised = int(packed[1])
    if held != promised and (storage.encoding == "raw" or packed is not None):
        what = f"holds {held} bytes of voxels, its header promises {promised}"
        return [problem(storage.data_path, what, "download it again")]
    if full:
        read_scan(path)
    return []
