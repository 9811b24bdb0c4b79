"""The pixels of one DICOM slice in Hounsfield units.

Uncompressed pixels are read here, to the byte. A compressed image is cut out of its file and decoded by GDCM in the
child process of :mod:`mg3d.scans.itk_process`, which sees size, bits and codestream and nothing else of the file.
"""

from __future__ import annotations

import io
from typing import IO

import numpy as np

from mg3d.errors import DataError
from mg3d.scans import itk_process
from mg3d.scans.dicom_file import NATIVE, name_of_uid, reading
from mg3d.scans.dicom_slice import CT_IMAGE, UNPACK, Slice
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

MEMORY_PER_BYTE = 16  # codecs hold several copies, some of them in wider numbers


def read_pixels(item: Slice) -> np.ndarray:
    """Read one slice with its own rescale slope and intercept applied.

    Args:
        item: from :func:`mg3d.scans.dicom_slice.read_slices`.

    Returns:
        [rows, columns] in Hounsfield units, or as stored where the file states no rescaling.

    Raises:
        DataError: the pixels are damaged, cut short, or compressed in a way nothing here decodes.
    """
    native = item.pixels.transfer_syntax in NATIVE
    stored = _native(item) if native else _decoded(item)
    if item.rescale is None:
        return stored
    slope, intercept = item.rescale
    if item.dtype.kind == "f":
        return slope * stored.astype(np.float64) + intercept
    return int(slope) * stored.astype(np.int32) + int(intercept)


def frame_bytes(item: Slice) -> int:
    """Bytes of one uncompressed image."""
    return item.size[0] * item.size[1] * item.pixels.allocated // 8


def _native(item: Slice) -> np.ndarray:
    pixels, nbytes = item.pixels, frame_bytes(item)
    if pixels.nbytes is None or pixels.nbytes < nbytes * item.frames:
        held = "none" if pixels.nbytes is None else pixels.nbytes
        message = f"holds {held} of {nbytes * item.frames} pixel bytes"
        raise DataError(message, DOWNLOAD_AGAIN, path=str(item.path))
    with item.path.open("rb") as file:
        file.seek(pixels.at + item.frame * nbytes)
        data = file.read(nbytes)
    if len(data) < nbytes:
        raise DataError(f"pixels end after {len(data)} of {nbytes} bytes", DOWNLOAD_AGAIN, path=str(item.path))
    order = "<" if pixels.little_endian else ">"
    values = np.frombuffer(data, f"{order}u{pixels.allocated // 8}").astype(f"u{pixels.allocated // 8}")
    return _used_bits(values.reshape(item.size[::-1]), item)


def _used_bits(values: np.ndarray, item: Slice) -> np.ndarray:
    """Drop the bits that the header says are not part of the number."""
    pixels = item.pixels
    above = pixels.allocated - 1 - pixels.high_bit
    numbers = (
        (values << above).astype(values.dtype).view(f"i{pixels.allocated // 8}" if pixels.signed else values.dtype)
    )
    return numbers >> (pixels.allocated - pixels.stored)


def _decoded(item: Slice) -> np.ndarray:
    with item.path.open("rb") as file, reading(item.path):
        frame = _compressed_frame(file, item)
        payload = _small_file(frame, item)
    memory = MEMORY_PER_BYTE * frame_bytes(item) + 2 * len(payload)
    try:
        about, voxels = itk_process.ask("decode", str(item.path), payload=payload, memory_bytes=memory)
    except DataError as problem:
        syntax = name_of_uid(item.pixels.transfer_syntax)
        message = problem.message.removeprefix(f"{item.path}: ")
        raise DataError(f"{syntax} pixels: {message}", UNPACK, path=str(item.path)) from None
    if voxels is None or voxels.size != item.size[0] * item.size[1] or voxels.dtype.kind not in "iu":
        message = f"its compressed image is {about['size']} of {about['kind']}, the header says {list(item.size)}"
        raise DataError(message, DOWNLOAD_AGAIN, path=str(item.path))
    return voxels.reshape(item.size[::-1])


def _compressed_frame(file: IO[bytes], item: Slice) -> bytes:
    from pydicom.encaps import get_frame

    file.seek(item.pixels.at)
    return get_frame(file, item.frame, number_of_frames=item.frames)  # type: ignore[arg-type]


def _small_file(frame: bytes, item: Slice) -> bytes:
    """One compressed image as a DICOM file of its own, with stored values in place of rescaled ones."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.filewriter import dcmwrite
    from pydicom.uid import UID

    about = Dataset()
    about.file_meta = FileMetaDataset()
    about.file_meta.TransferSyntaxUID = UID(item.pixels.transfer_syntax)
    about.SOPClassUID, about.SOPInstanceUID = CT_IMAGE, "1.2.3"
    about.SamplesPerPixel, about.PhotometricInterpretation = 1, "MONOCHROME2"
    about.Columns, about.Rows = item.size
    about.BitsAllocated, about.BitsStored = item.pixels.allocated, item.pixels.stored
    about.HighBit, about.PixelRepresentation = item.pixels.high_bit, int(item.pixels.signed)
    about.PixelData = encapsulate([frame])
    about["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dcmwrite(buffer, about, enforce_file_format=True)
    return buffer.getvalue()
