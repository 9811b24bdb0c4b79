"""Checkpoints that are whole or absent, carry a digest, and hold only tensors and plain types."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.plugins.io import CheckpointIO

from mg3d.atomic import atomic_path, remove_abandoned, write_text_atomically, writing
from mg3d.errors import CheckpointError
from mg3d.models.safe_reading import read_torch
from mg3d.models.weights_file import METADATA_KEY, check_format_version

log = logging.getLogger(__name__)

SUFFIX = ".ckpt"
SIDECAR = ".sha256"
SPACE_FACTOR = 1.2
REMEDY = "free space or choose another log_dir, then resume_from=last"
READ_BLOCK = 1 << 22
RESUMABLE = ("state_dict", "optimizer_states", "global_step")
"""What a checkpoint must hold to be resumed."""
_NOTE = re.compile(r"^# mg3d step=(-?\d+) epoch=(-?\d+) kind=(\w+)")


class _HashingFile(io.RawIOBase):
    """Write-only file that digests what passes through, so the checkpoint is not read a second time."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._file = os.fdopen(descriptor, "wb", buffering=READ_BLOCK)
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self.size += len(view)
        return len(view)

    def finish(self) -> str:
        """Flush to the disk and return the digest in hexadecimal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


def to_safe(value: Any, place: str = "checkpoint") -> Any:
    """Copy a checkpoint tree with every leaf made loadable by ``torch.load(weights_only=True)``.

    Mappings become ``dict`` (or ``OrderedDict``), paths become text, NumPy scalars become Python numbers and arrays
    become tensors; tensors are passed through.

    Raises:
        CheckpointError: a leaf of another type, with its place in the tree.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes, complex)):
        return value if type(value) in (bool, int, float, str, bytes, complex, type(None)) else _base_type(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((_key(key, place), to_safe(item, f"{place}.{key}")) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        items = [to_safe(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return set(items) if isinstance(value, set) else (tuple(items) if isinstance(value, tuple) else items)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (torch.device, torch.dtype, torch.Size)):
        return value
    raise CheckpointError(f"{place} is a {type(value).__name__}", "keep tensors and plain types in module state")


def _base_type(value: Any) -> Any:
    """Plain twin of an instance of a subclass (an ``IntEnum``, ``numpy.float64``, a text subclass)."""
    kinds: tuple[Any, ...] = (bool, int, float, str, bytes, complex)
    return next(kind(value) for kind in kinds if isinstance(value, kind))


def _key(key: Any, place: str) -> Any:
    if isinstance(key, (str, int, float, bool, tuple)) or key is None:
        return key if type(key) in (str, int, float, bool, tuple, type(None)) else _base_type(key)
    raise CheckpointError(f"{place} has a key of type {type(key).__name__}", "use text or numbers as keys")


def sidecar_path(path: Path) -> Path:
    """Name of the digest file of a checkpoint (``sha256sum -c`` reads it)."""
    return path.with_name(path.name + SIDECAR)


def _write_sidecar(path: Path, digests: list[str], note: str) -> None:
    lines = [note, *(f"{digest}  {path.name}" for digest in digests)]
    write_text_atomically(sidecar_path(path), "\n".join(lines) + "\n")


def read_sidecar(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Accepted digests of a checkpoint and the note (step, epoch, kind) written with them; empty without a sidecar."""
    try:
        lines = sidecar_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [], {}
    match = next((found for found in map(_NOTE.match, lines) if found), None)
    note = {"step": int(match[1]), "epoch": int(match[2]), "kind": match[3]} if match else {}
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")], note


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(path: Path) -> str:
    """Say what is wrong with a checkpoint file, or "" when it is whole.

    With a sidecar the digest decides; without one the zip directory and its checksums do.
    """
    if not path.is_file():
        return "no such file"
    if path.stat().st_size == 0:
        return "empty file"
    accepted, _ = read_sidecar(path)
    if accepted:
        return "" if file_digest(path) in accepted else "its sha256 differs from the sidecar"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return f"damaged at {broken}" if broken else ""
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"not a whole checkpoint ({error})"


def save_file(content: Mapping[str, Any], path: Path, note: str = "") -> None:
    """Write a checkpoint so that a kill at any instant leaves the old file or the new one, with a digest that fits.

    The bytes go to a temporary file in the same folder, reach the disk, and are renamed. The sidecar is written
    before the rename with the new digest beside the old one, and once more after it with the new one alone.

    Args:
        content: checkpoint tree.
        path: final name.
        note: comment line of the sidecar.

    Raises:
        OutputError: the disk is full or read-only, with needed and free bytes; the previous file stays.
        CheckpointError: the tree holds something else than tensors and plain types.
    """
    safe = to_safe(content)
    needed = int(SPACE_FACTOR * _expected_bytes(path, safe))
    with writing(path, REMEDY, needed=needed):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, REMEDY, needed=needed, mode=0o600) as temporary:
        digest = _write_temporary(safe, temporary)
        _write_sidecar(path, [digest, *_present_digest(path)], note)
    _write_sidecar(path, [digest], note)


def _present_digest(path: Path) -> list[str]:
    """The digest of the file that is there; a kill before the rename leaves a sidecar with one that never came."""
    known = read_sidecar(path)[0] if path.is_file() else []
    return known if len(known) < 2 else [file_digest(path)]


def _write_temporary(safe: Any, temporary: Path) -> str:
    descriptor = os.open(temporary, os.O_WRONLY | os.O_TRUNC)
    stream = _HashingFile(descriptor)
    try:
        torch.save(safe, stream)  # type: ignore[arg-type]
        return stream.finish()
    except RuntimeError as error:  # the zip writer of torch hides the OSError of its stream
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise OSError(getattr(error, "errno", None) or 5, str(error).splitlines()[0]) from error
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def _expected_bytes(path: Path, safe: Any) -> int:
    previous = path.stat().st_size if path.is_file() else 0
    return max(previous, _tensor_bytes(safe))


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def load_file(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Verify a checkpoint against its sidecar and load it with ``weights_only=True``.

    Raises:
        CheckpointError: missing, damaged, or holding more than tensors and plain types.
    """
    problem = check_file(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}", "resume_from=last picks the newest checkpoint that verifies")
    content = read_torch(path, check_sums=False, map_location=map_location)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}", "give a checkpoint written by this project")
    check_format_version(content.get(METADATA_KEY), path)
    return content


@dataclass(frozen=True)
class ResumeChoice:
    """Checkpoint to resume from and the newer ones that were passed over, each with the reason."""

    path: Path
    skipped: tuple[tuple[Path, str], ...]


def newest_checkpoint(folders: list[Path]) -> ResumeChoice:
    """Newest checkpoint that verifies and can be resumed.

    Args:
        folders: checkpoint folders, the newest run first; inside one the larger optimizer step is newer.

    Raises:
        CheckpointError: none is left, listing what was skipped and why.
    """
    skipped: list[tuple[Path, str]] = []
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}"), key=_age, reverse=True):
            kind = read_sidecar(path)[1].get("kind", "full")
            problem = check_file(path) or ("it holds weights only" if kind == "weights" else "")
            if not problem:
                return ResumeChoice(path, tuple(skipped))
            skipped.append((path, problem))
    listed = "; ".join(f"{path.name}: {problem}" for path, problem in skipped[:3]) or "none found"
    raise CheckpointError(f"no checkpoint to resume ({listed})", "leave resume_from out to start a new run")


def _age(path: Path) -> tuple[int, float]:
    return int(read_sidecar(path)[1].get("step", -1)), path.stat().st_mtime


class AtomicCheckpointIO(CheckpointIO):
    """The only door through which the trainer writes, reads and removes checkpoints."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one checkpoint atomically with its digest (see :func:`save_file`)."""
        if storage_options is not None:
            raise TypeError("storage_options are not supported by AtomicCheckpointIO")
        kind = "full" if "optimizer_states" in checkpoint else "weights"
        step, epoch = int(checkpoint.get("global_step", -1)), int(checkpoint.get("epoch", -1))
        save_file(checkpoint, Path(path), f"# mg3d step={step} epoch={epoch} kind={kind}")

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and load; ``weights_only`` is always True here, whatever the caller asks."""
        content = load_file(Path(path), map_location if map_location is not None else "cpu")
        lacking = [key for key in RESUMABLE if key not in content]
        if lacking:
            raise CheckpointError(
                f"{path} cannot be resumed: it has no {', '.join(lacking)}", "start from its weights with load_path"
            )
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its sidecar; the checkpoint goes first, so none is left without a digest."""
        Path(path).unlink(missing_ok=True)
        sidecar_path(Path(path)).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete temporary files in a checkpoint folder whose writers are provably gone; returns what was removed."""
    return remove_abandoned(folder)
