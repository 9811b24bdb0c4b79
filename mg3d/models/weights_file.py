"""Reading and writing weights files safely: integrity checks, no execution, metadata.

Accepted files: Lightning checkpoints, flat dicts of tensors, dicts wrapped in ``state_dict`` / ``network_weights`` /
``net`` / ``student`` / ``model``, safetensors, and export folders (see :mod:`mg3d.models.export`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.atomic import atomic_path, write_text_atomically
from mg3d.errors import CheckpointError
from mg3d.floors import warn_below_floors
from mg3d.models.safe_reading import (
    DIGEST_KEY,
    METADATA_KEY,
    check_tensors,
    is_safetensors,
    read_safetensors,
    read_torch,
    tensor_digest,
)

FORMAT_VERSION = 1
"""Version of the metadata; a larger number in a file is refused."""

WEIGHTS_NAME = "model.safetensors"
"""File of the tensors inside an export folder."""

NNUNET_KEY = "nnunet_init_args"
"""Entry of the metadata that holds nnU-Net's plans, for files of nnU-Net."""

WRAPPERS = ("state_dict", "network_weights", "net", "student", "model")
"""Names under which other programs nest the tensors, in the order in which they are tried."""

_OUTER_PREFIXES = ("module.", "backbone.", "student.", "_orig_mod.", "network.")


@dataclass(frozen=True)
class WeightsFile:
    """Content of a weights file.

    Attributes:
        tensors: name -> tensor on the CPU, outer prefixes such as ``module.`` removed.
        metadata: description stored beside them; empty for files of other programs.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """Name of the checksum file of a weights file: ``<file>.sha256``."""
    return Path(f"{os.fspath(path)}.sha256")


def write_sidecar(path: str | os.PathLike[str]) -> Path:
    """Write the checksum file beside a weights file, in the format of ``sha256sum``."""
    sidecar = sidecar_path(path)
    write_text_atomically(sidecar, f"{file_sha256(path)}  {Path(path).name}\n")
    return sidecar


def verify_sidecar(path: str | os.PathLike[str]) -> bool:
    """Compare a file with its checksum file.

    The checksum file has one accepted digest per line (two while a checkpoint is being replaced); lines that start with
    ``#`` are notes.

    Returns:
        True if a digest matches, False if there is none to compare with.

    Raises:
        CheckpointError: none of them matches.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return False
    lines = sidecar.read_text(encoding="utf-8", errors="replace").splitlines()
    accepted = [line.split()[0].lower() for line in lines if line.strip() and not line.startswith("#")]
    if accepted and file_sha256(path) not in accepted:
        raise CheckpointError(
            f"{path} does not match its checksum file {sidecar.name}: the file is damaged or was replaced",
            "copy or download the weights again, or delete the checksum file if you changed the weights yourself",
        )
    return bool(accepted)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a torch or safetensors file as it is, without executing anything in it, after checking its integrity.

    Args:
        path: the file, or an export folder; ``<path>.sha256`` is verified when it exists, otherwise the checksums
            inside torch's zip format, or the digest in the header of a safetensors file written here.

    Returns:
        The stored dictionary; for safetensors ``{"state_dict": tensors, "mg3d_metadata": metadata}``.

    Raises:
        CheckpointError: missing, a directory, empty, truncated, damaged, of a newer format, or holding more than
            tensors and plain values.
    """
    warn_below_floors()
    path = Path(path)
    if (path / WEIGHTS_NAME).is_file():
        path = path / WEIGHTS_NAME
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, not a weights file", "name the file inside it")
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist", "check load_path / resume_from")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"weights file {path} may not be read", "mend its permissions")
    verified = verify_sidecar(path)
    if is_safetensors(path):
        content = read_safetensors(path, check_digest=not verified)
    else:
        content = read_torch(path, check_sums=not verified)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors", "save a state dict")
    check_format_version(content.get(METADATA_KEY), path)
    return dict(content)


def check_format_version(metadata: Any, path: str | os.PathLike[str]) -> None:
    """Refuse metadata of a later version of this project, whose meaning is not known here.

    Raises:
        CheckpointError: the format is newer, or its number is none.
    """
    version = metadata.get("format_version", FORMAT_VERSION) if isinstance(metadata, Mapping) else FORMAT_VERSION
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has weights format version {version}, this program reads up to {FORMAT_VERSION}",
            "update mg3d, or export the weights again with this version",
        )


def read_weights_file(path: str | os.PathLike[str]) -> WeightsFile:
    """Read tensors and metadata from any accepted file.

    Raises:
        CheckpointError: see :func:`load_checkpoint`; or no tensors inside, or two of one name.
    """
    content = load_checkpoint(path)
    state = _unwrap(content)
    found = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    check_tensors(found, path)
    tensors = {_strip_outer(key): value for key, value in found.items()}
    if len(tensors) < len(found):
        raise CheckpointError(
            f"{path} holds {len(found) - len(tensors)} tensors twice, with and without a prefix such as module.",
            "keep one of the two state dicts in the file",
        )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors", f"expected a state dict, flat or under {', '.join(WRAPPERS)}")
    return WeightsFile(tensors, _metadata_of(content))


def load_state_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of any accepted file.

    Returns:
        name -> tensor on the CPU; prefixes such as ``module.`` and ``backbone.`` are removed.

    Raises:
        CheckpointError: see :func:`load_checkpoint`; or no tensors inside.
    """
    return read_weights_file(path).tensors


def save_weights(
    module: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> Path:
    """Write a safetensors file with metadata and its checksum file; a crash never leaves a half-written file.

    Args:
        module: a module, or its state dict.
        path: file to write, usually ``*.safetensors``.
        metadata: plain JSON values, see :func:`describe_weights`.

    Returns:
        The path.

    Raises:
        OutputError: no room, no permission.
    """
    from safetensors.torch import save_file

    path = Path(path)
    state = module.state_dict() if isinstance(module, nn.Module) else module
    # clones: safetensors refuses tensors that share memory
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    header = {METADATA_KEY: json.dumps(dict(metadata), sort_keys=True), DIGEST_KEY: tensor_digest(tensors)}
    with atomic_path(path, needed=sum(value.nbytes for value in tensors.values())) as partial:
        save_file(tensors, partial, metadata=header)
    write_sidecar(path)
    return path


def save_torch(content: Mapping[str, Any], path: Path) -> Path:
    """Write a torch file of tensors and plain values with its checksum file, whole or not at all.

    Raises:
        OutputError: no room, no permission.
    """
    needed = sum(value.nbytes for part in content.values() for value in _tensors(part))
    with atomic_path(path, needed=needed) as partial:
        torch.save(dict(content), partial)
    write_sidecar(path)
    return path


def _tensors(part: Any) -> list[Tensor]:
    return [value for value in part.values() if isinstance(value, Tensor)] if isinstance(part, Mapping) else []


def _unwrap(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for _ in range(len(WRAPPERS)):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def _metadata_of(content: Mapping[str, Any]) -> dict[str, Any]:
    stored = content.get(METADATA_KEY)
    if isinstance(stored, Mapping):
        return dict(stored)
    if isinstance(content.get("init_args"), Mapping):
        return {NNUNET_KEY: dict(content["init_args"])}
    hyper = content.get("hyper_parameters")
    return dict(hyper) if isinstance(hyper, Mapping) else {}


def _strip_outer(key: str) -> str:
    stripped = key
    while stripped.startswith(_OUTER_PREFIXES):
        stripped = stripped.split(".", 1)[1]
    return stripped
