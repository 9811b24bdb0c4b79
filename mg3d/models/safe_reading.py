"""Tensors from torch and safetensors files: nothing of the file is executed, and its size bounds what reading it takes.

Torch stores its zip members without compression, so a compressed one, or members that claim more bytes than the file
has, are refused before anything is inflated.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mg3d.errors import CheckpointError, MG3DError

METADATA_KEY = "mg3d_metadata"
"""Entry of a checkpoint (a plain dict) or of a safetensors header (its JSON) that describes the weights."""

DIGEST_KEY = "mg3d_tensor_sha256"
"""Entry of a safetensors header that pins names and bytes of all tensors."""

MAX_HEADER_BYTES = 32 * 2**20
MAX_PICKLE_BYTES = 64 * 2**20
"""Names and structure of a file, without the tensors; real files need a few MiB."""

SPARE_TENSOR_BYTES = 2 * 2**30
"""What tensors may take beyond the size of their file: one number may stand for many (an expanded tensor)."""

_ALLOCATES = b"bytearray"
"""The one builtin that safe loading calls and that takes memory by a number alone."""


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its name or its first bytes."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_safetensors(path: Path, *, check_digest: bool) -> dict[str, Any]:
    """Tensors and metadata of a safetensors file, as ``{"state_dict": ..., "mg3d_metadata": ...}``.

    Args:
        path: the file.
        check_digest: compare the tensors with the digest in the header, if there is one.

    Raises:
        CheckpointError: damaged, or a header that is too large or no JSON.
    """
    from safetensors import safe_open

    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
        if MAX_HEADER_BYTES < size < path.stat().st_size:
            raise damaged(path, f"its header of {size} bytes is larger than {MAX_HEADER_BYTES}")
        with safe_open(path, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            header = opened.metadata() or {}
        metadata = json.loads(header.get(METADATA_KEY, "{}"))
    except MG3DError:
        raise
    except RecursionError as error:
        raise damaged(path, "its metadata is nested too deeply") from error
    except Exception as error:  # damaged content can fail in any way
        raise damaged(path, error) from error
    if check_digest and DIGEST_KEY in header and tensor_digest(tensors) != header[DIGEST_KEY]:
        raise damaged(path, "the digest of its tensors is wrong")
    return {"state_dict": tensors, METADATA_KEY: metadata}


def read_torch(path: Path, *, check_sums: bool = True, map_location: Any = "cpu") -> Any:
    """Content of a file that ``torch.save`` wrote: tensors and plain values, nothing else.

    Args:
        path: the file.
        check_sums: check the checksums inside torch's zip format.
        map_location: where tensors go.

    Raises:
        CheckpointError: damaged, or holding more than tensors and plain values, or inflating beyond its size.
    """
    try:
        check_archive(path, check_sums=check_sums)
        with torch.serialization.safe_globals(_numpy_numbers()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location=map_location, weights_only=True)
    except MG3DError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # damaged content can fail in any way, OSError included
        raise damaged(path, error) from error


def check_archive(path: Path, *, check_sums: bool = True) -> None:
    """Refuse a torch file that would take more memory than its size lets expect, before anything is read into memory.

    Args:
        path: the file.
        check_sums: check the checksums of a zip file as well.

    Raises:
        CheckpointError: compressed members, members that claim more bytes than the file has, or a pickle that is too
            large or allocates memory by a number.
    """
    with open(path, "rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"
    if not is_zip:
        _check_bare_pickle(path)
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = next((entry for entry in members if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise _refusal(path, f"{packed.filename} is compressed, torch stores tensors uncompressed")
        if sum(entry.file_size for entry in members) > path.stat().st_size:
            raise _refusal(path, "its members claim more bytes than the file has")
        for entry in members:
            if entry.filename.endswith("/data.pkl") or entry.filename == "data.pkl":
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise _refusal(path, f"the structure in {entry.filename} takes {entry.file_size} bytes")
                if _ALLOCATES in archive.read(entry):
                    raise _refusal(path, "it holds a bytearray")
        broken = archive.testzip() if check_sums else None
    if broken:
        raise damaged(path, f"checksum of {broken} is wrong")


def _check_bare_pickle(path: Path) -> None:
    """The old format without zip: the pickle comes first, the bytes of the tensors follow."""
    if not path.stat().st_size:
        return
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(_ALLOCATES, 0, MAX_PICKLE_BYTES) >= 0:
            raise _refusal(path, "it holds a bytearray")


def check_tensors(tensors: Mapping[str, Tensor], path: Any) -> None:
    """Refuse tensors without plain numbers in memory, and more of them than the file can hold.

    Raises:
        CheckpointError: sparse, quantised, complex, nested or empty-handed (meta) tensors, or a few stored numbers
            that stand for an immense tensor.
    """
    odd = [name for name, value in tensors.items() if not _is_plain(value)]
    if odd:
        value = tensors[odd[0]]
        raise CheckpointError(
            f"{path} holds {len(odd)} tensors that are no plain numbers: {odd[0]} is {_kind(value)}",
            "save the state dict of the plain float model",
        )
    place = Path(path)
    size = sum(entry.stat().st_size for entry in place.iterdir() if entry.is_file()) if place.is_dir() else 0
    size = size or place.stat().st_size
    claimed = sum(value.numel() * value.element_size() for value in tensors.values())
    if claimed > 2 * size + SPARE_TENSOR_BYTES:
        raise CheckpointError(
            f"{path} claims {claimed / 2**30:.1f} GiB of tensors in a file of {size} bytes",
            "save the tensors with .clone(), or get the file from another source",
        )


def _is_plain(value: Tensor) -> bool:
    plain = value.layout == torch.strided and value.device.type != "meta" and not value.is_nested
    return plain and not value.is_quantized and not value.is_complex() and type(value) in (Tensor, torch.nn.Parameter)


def _kind(value: Tensor) -> str:
    where = " on the meta device" if value.device.type == "meta" else ""
    return f"{type(value).__name__} ({value.dtype}, {value.layout}{where})"


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _numpy_numbers() -> list[Any]:
    """What rebuilds single NumPy numbers, which nnU-Net keeps beside its weights; no arrays, no objects."""
    scalar = np.float64(0).__reduce__()[0]
    return [scalar, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]


def _refused(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    forbidden = re.search(r"GLOBAL (\S+)|Unsupported class[^\n]*", str(error))
    if forbidden is None:
        return damaged(path, error)
    return _refusal(
        path,
        f"it holds more than tensors and plain values ({forbidden.group(1) or forbidden.group(0)}); it was not run",
    )


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: {reason}", "re-save its tensors where it was made: torch.save(model.state_dict(), ...)"
    )


def damaged(path: Path, error: object) -> CheckpointError:
    """Error for a file that cannot be read; torch's own advice to load unsafely is never repeated."""
    text = str(error).strip()
    if "Weights only load failed" in text or "weights_only" in text:
        unpickler = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", text)
        text = f"unsupported pickle, {unpickler.group(1).strip()}" if unpickler else "unsupported pickle"
    reason = (text.splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(
        f"{path} is truncated or damaged, or is no weights file ({path.stat().st_size} bytes): {reason}",
        "copy or download it again, or use an earlier checkpoint",
    )
