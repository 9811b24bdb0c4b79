"""Headers and streams that promise or unfold far more than they hold are refused before memory is taken."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from isal import igzip
from prepro_builders import chest
from scan_files import axial_series, save_volume

from tests.peak_memory import PEAK_MIB

MIB = 2**20
UNFOLDED_MIB = 128
MEASURE = f"""{PEAK_MIB}
import sys
from pathlib import Path
from mg3d.errors import DataError
from mg3d.scans.read import read_scan
before = peak_mib()
try:
    read_scan(Path(sys.argv[1]))
    print("accepted")
except DataError as problem:
    print(peak_mib() - before, problem.message)
"""
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nencoding: {encoding}\nendian: little\n\n"
META = "NDims = 3\nDimSize = {sizes}\nElementType = MET_SHORT\nCompressedData = {packed}\nElementDataFile = LOCAL\n"
HUGE, SMALL, UNTRUE = "32767 32767 3000", "10 12 14", "1000 1000 500"


def _zeros(mib: int = UNFOLDED_MIB) -> bytes:
    return bytes(mib * MIB)


def _nifti_header(shape: tuple[int, int, int]) -> bytes:
    header = bytearray(352)
    header[0:4], header[40:48] = struct.pack("<i", 348), struct.pack("<4h", 3, *shape)
    header[70:74], header[108:112] = struct.pack("<2h", 4, 16), struct.pack("<f", 352.0)
    header[76:92], header[344:348] = struct.pack("<4f", 1, 1, 1, 1), b"n+1\0"
    return bytes(header)


def _npz(path: Path, shape: tuple[int, ...], values: bytes) -> None:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("arr_0.npy", content.getvalue() + values)


def _dicom(folder: Path) -> Path:
    for path in axial_series(folder, chest()):
        content = path.read_bytes()
        for element in (b"\x10", b"\x11"):  # rows and columns: 65,000 each
            content, count = re.subn(
                re.escape(b"\x28\0" + element + b"\0\x02\0\0\0") + b"..",
                b"\x28\0" + element + b"\0\x02\0\0\0" + struct.pack("<H", 65000),
                content,
                flags=re.DOTALL,
            )
            assert count == 1
        path.write_bytes(content)
    return folder


def _bomb(kind: str, folder: Path) -> Path:
    path = folder / kind.split()[-1]
    match kind:
        case "claims.nii.gz":
            path.write_bytes(igzip.compress(_nifti_header((32767, 32767, 3000))))
        case "claims.nii":
            path.write_bytes(_nifti_header((32767, 32767, 3000)))
        case "untrue.nii.gz":
            path.write_bytes(igzip.compress(_nifti_header((1000, 1000, 500)) + bytes(1000)))
        case "unfolds.nii.gz":
            path.write_bytes(igzip.compress(_nifti_header((10, 12, 14)) + _zeros()))
        case "claims.nrrd" | "untrue.nrrd":
            sizes = HUGE if kind == "claims.nrrd" else UNTRUE
            path.write_bytes(NRRD.format(sizes=sizes, encoding="gzip").encode() + igzip.compress(bytes(1000)))
        case "unfolds.nrrd":
            path.write_bytes(NRRD.format(sizes=SMALL, encoding="gzip").encode() + igzip.compress(_zeros()))
        case "claims.mha" | "untrue.mha":
            sizes = HUGE if kind == "claims.mha" else UNTRUE
            path.write_bytes(META.format(sizes=sizes, packed=False).encode() + bytes(1000))
        case "unfolds.mha":
            path.write_bytes(META.format(sizes=SMALL, packed=True).encode() + zlib.compress(_zeros(), 1))
        case "claims.npz":
            _npz(path, (3000, 32767, 32767), bytes(1000))
        case "untrue.npz":
            _npz(path, (500, 1000, 1000), bytes(1000))
        case "unfolds.npz":
            _npz(path, (10, 12, 14), _zeros())
        case "claims":
            _dicom(path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("claims.nii.gz", "claims.nii", "untrue.nii.gz", "unfolds.nii.gz", "claims.nrrd", "untrue.nrrd"),
        *("unfolds.nrrd", "claims.mha", "untrue.mha", "unfolds.mha", "claims.npz", "untrue.npz", "unfolds.npz"),
        "claims",
    ],
)
def test_bombs_are_refused_in_little_memory(kind: str, tmp_path: Path, repository: Path) -> None:
    path = _bomb(kind, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, encoding="utf-8", check=True, env=environment
    )
    grown_mib, _, message = done.stdout.strip().partition(" ")
    words = {
        "claims": r"the header claims \d+\.\d GiB",
        "untrue": r"cannot hold the \d+ the header claims",
        "unfolds": "more data than the header says",
    }[kind.partition(".")[0]]
    assert re.search(words, message), done.stdout
    assert int(grown_mib) < 60


def test_the_limit_can_be_raised_and_lowered(tmp_path: Path) -> None:
    from mg3d.errors import DataError
    from mg3d.scans.read import read_scan

    size_gib = chest().nbytes / 2**30
    for name in ("a.nii.gz", "a.nrrd", "a.mha"):
        path = save_volume(tmp_path / name, chest())
        assert read_scan(path, size_gib * 1.01).voxels_xyz.shape == chest().shape
        with pytest.raises(DataError, match="the limit is") as caught:
            read_scan(path, size_gib * 0.99)
        assert "--max-volume-gib" in caught.value.remedy
