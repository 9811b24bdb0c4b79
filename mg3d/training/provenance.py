"""What a run was made of: code, packages, machine and data, for ``environment.json``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mg3d.floors import warn_below_floors

REPOSITORY = Path(__file__).resolve().parents[2]
CRC_COLUMN = "row_crc32"
ID_COLUMN = "image_id"


def _git(*arguments: str, folder: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def code_state(folder: Path = REPOSITORY) -> dict[str, Any]:
    """Commit of the checkout and whether tracked files differ from it (None where there is no git)."""
    changes = _git("status", "--porcelain", "--untracked-files=no", folder=folder)
    return {"commit": _git("rev-parse", "HEAD", folder=folder), "dirty": None if changes is None else bool(changes)}


def package_versions() -> dict[str, str]:
    """Version of every installed distribution."""
    found = ((item.metadata["Name"], item.version) for item in importlib.metadata.distributions())
    return dict(sorted((str(name), version) for name, version in found if name))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def hardware() -> dict[str, Any]:
    """Machine, processors, memory in GiB and GPU names."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def arrow_digest(path: Path) -> dict[str, Any]:
    """Rows, bytes and a content digest of one Arrow file.

    The digest runs over the per-row checksums (the ids where a published file has none), so it pins every row without
    reading the volumes.
    """
    import pyarrow as pa

    state: dict[str, Any] = {"bytes": path.stat().st_size}
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            column = CRC_COLUMN if CRC_COLUMN in reader.schema.names else ID_COLUMN
            digest, rows = hashlib.sha256(), 0
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                rows += batch.num_rows
                digest.update(repr(batch.column(column).to_pylist()).encode())
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        return {**state, "unreadable": str(error).splitlines()[0]}
    return {**state, "rows": rows, "digest": digest.hexdigest(), "digest_of": column}


def data_manifest(data_root: str | Path, datasets: Sequence[str]) -> dict[str, Any]:
    """Digest of every Arrow file of the named datasets, and of the manifest that the packer wrote beside them."""
    root = Path(data_root)
    splits = ("train", "val", "test")
    files = sorted(path for key in datasets for s in splits for path in root.glob(f"{key}_{s}*.arrow"))
    found: dict[str, Any] = {path.name: arrow_digest(path) for path in files}
    for path in sorted(root.glob("*manifest*.json")):
        found[path.name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return found


def content_digests(manifest: Mapping[str, Any], datasets: Sequence[str], tokenizer: str) -> dict[str, str]:
    """What training reads -> digest of its content, wherever it lies.

    Args:
        manifest: from :func:`data_manifest`.
        datasets: keys of the corpora.
        tokenizer: hub id, or folder of the text encoder.
    """
    from mg3d.models.language_encoders.registry import encoder_revision

    found = {"text encoder": encoder_revision(tokenizer) or tokenizer}
    for name in (f"{key}_{split}" for key in datasets for split in ("train", "val")):
        files = (manifest[file] for file in sorted(manifest) if file.startswith(name) and file.endswith(".arrow"))
        rows = "".join(str(entry.get("digest", entry)) for entry in files)
        found[name] = hashlib.sha256(rows.encode()).hexdigest()
    return found


def describe(data_root: str | Path, datasets: Sequence[str], world_size: int) -> dict[str, Any]:
    """Everything of ``environment.json``; warns of packages below their floors."""
    warn_below_floors()
    return {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "code": code_state(),
        "packages": package_versions(),
        "hardware": hardware(),
        "world_size": world_size,
        "process_defaults": os.environ.get("MG3D_PROCESS_DEFAULTS", "not applied"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "data": data_manifest(data_root, datasets),
    }
