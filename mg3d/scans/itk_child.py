"""The program of the child process that runs ITK and GDCM, whose faults on crafted files end a process.

It is started as a script by :mod:`mg3d.scans.itk_process`, imports nothing of the project, and answers requests from
standard input until that is closed. Request and reply: lengths of two parts as two little-endian uint64, then one JSON
object, then raw bytes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO

import SimpleITK

LENGTHS = struct.Struct("<QQ")
NUMBER_TYPES = ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float32", "Float64")
Answer = tuple[dict[str, Any], bytes | memoryview]


def information(request: dict[str, Any], payload: bytes) -> Answer:
    """Header of an image file, no pixels."""
    reader = _reader(request["path"], request["image_io"])
    reader.ReadImageInformation()
    return _geometry(reader) | {"components": reader.GetNumberOfComponents()}, b""


def image(request: dict[str, Any], payload: bytes) -> Answer:
    """Header and voxels of an image file in any format of ITK."""
    return _with_voxels(_reader(request["path"], "").Execute())


def decode(request: dict[str, Any], payload: bytes) -> Answer:
    """Stored pixels of a DICOM file given as bytes."""
    with tempfile.TemporaryFile() as file:
        file.write(payload)
        file.flush()
        return _with_voxels(_reader(f"/dev/fd/{file.fileno()}", "GDCMImageIO").Execute())


OPERATIONS: dict[str, Callable[[dict[str, Any], bytes], Answer]] = {
    "information": information,
    "image": image,
    "decode": decode,
}


def _reader(path: str, image_io: str) -> Any:
    reader = SimpleITK.ImageFileReader()
    if image_io:
        reader.SetImageIO(image_io)
    reader.SetFileName(path)
    return reader


def _geometry(holder: Any) -> dict[str, Any]:
    kinds = {getattr(SimpleITK, f"sitk{name}"): name.lower() for name in NUMBER_TYPES}
    pixel = holder.GetPixelID()
    return {
        "size": list(holder.GetSize()),
        "spacing": list(holder.GetSpacing()),
        "origin": list(holder.GetOrigin()),
        "direction": list(holder.GetDirection()),
        "dtype": kinds.get(pixel),
        "kind": SimpleITK.GetPixelIDValueAsString(pixel),
    }


def _with_voxels(found: Any) -> Answer:
    about = _geometry(found) | {"components": found.GetNumberOfComponentsPerPixel()}
    if about["dtype"] is None:
        return about, b""
    return about, SimpleITK.GetArrayFromImage(found).data.cast("B")


def _limit(seconds: int, extra_bytes: int) -> None:
    """End this process when a request takes too long; let it allocate so much more than it has now."""
    signal.alarm(seconds)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: the time limit alone
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = taken + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _answer(request: dict[str, Any], payload: bytes) -> Answer:
    try:
        _limit(request["seconds"], request["memory"])
        return OPERATIONS[request["do"]](request, payload)
    except MemoryError:
        return {"error": "it needs more memory than its header promises"}, b""
    except Exception as problem:  # whatever ITK says about a damaged file goes back as text
        return {"error": str(problem) or type(problem).__name__}, b""


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while len(lengths := requests.read(LENGTHS.size)) == LENGTHS.size:
        first, second = LENGTHS.unpack(lengths)
        about, data = _answer(json.loads(requests.read(first)), requests.read(second))
        signal.alarm(0)
        text = json.dumps(about).encode()
        replies.write(LENGTHS.pack(len(text), len(data)) + text)
        replies.write(data)
        replies.flush()


def main() -> None:
    """Take over standard input and output for the requests; ITK's own messages go nowhere."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the pipe
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    serve(requests, replies)


if __name__ == "__main__":
    main()
