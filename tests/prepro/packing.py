"""Run the packer on small downloads and look at what it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mg3d.datasets.arrow_schema import check_schema
from prepro.prepro_pretraining_data import main

SIZE = ["--image-size", "8", "6", "8", "--target-spacing", "none"]


def pack_ct_rate(root: Path, out: Path, *more: str) -> int:
    """Run the command on a CT-RATE tree, in this process."""
    return main(["ct_rate", "--root", str(root), "--out", str(out), *SIZE, "--workers", "1", *more])


def pack_ctrg(annotation: Path, out: Path, *more: str) -> int:
    """Run the command on a CTRG tree, in this process."""
    root = str(annotation.parent)
    return main(["ctrg", "--root", root, "--annotation", str(annotation), "--out", str(out), *SIZE[:4], *more])


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of an Arrow file, its layout checked."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        assert check_schema(reader.schema, path=str(path)) == "mg3d"
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        assert all(batch.num_rows == 1 for batch in batches)
        return [batch.to_pylist()[0] for batch in batches]


def manifest_of(out: Path, name: str) -> dict[str, Any]:
    """A manifest; ``name`` is that of an Arrow file without suffix, or of a corpus."""
    return json.loads((out / f"{name}.manifest.json").read_text(encoding="utf-8"))


def image_of(row: dict[str, Any]) -> np.ndarray:
    """The voxels of a row."""
    return np.frombuffer(row["image"], row["image_dtype"]).reshape(row["image_shape"])


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file, hidden ones too; the commit in manifests left out, which may change between two runs."""
    return {path.name: re.sub(rb'"commit": "\w*"', b"", path.read_bytes()) for path in folder.iterdir()}


def visible(folder: Path) -> list[str]:
    """Names of the files that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
