"""Every checkpoint that a run writes, kept as a kill at that instant would leave it, and comparison to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mg3d.training.checkpoint_io import AtomicCheckpointIO, sidecar_path


def keep_every_checkpoint(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Copy each checkpoint with its digest to ``folder`` as soon as it is written."""
    write = AtomicCheckpointIO.save_checkpoint
    folder.mkdir()

    def save(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: str | Path, **more: Any) -> None:
        write(self, checkpoint, path, **more)
        copy = folder / f"{len(list(folder.glob('*.ckpt'))):02d}-{Path(path).name}"
        shutil.copy(path, copy)
        sidecar_path(copy).write_text(
            sidecar_path(Path(path)).read_text(encoding="utf-8").replace(Path(path).name, copy.name)
        )

    patch.setattr(AtomicCheckpointIO, "save_checkpoint", save)


def final_state(run_dir: Path) -> dict[str, Any]:
    """Weights, optimizer and place at the end of a run."""
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    place = {key: last["mg3d_position"][key] for key in ("epoch", "batches", "step")} if "mg3d_position" in last else {}
    return {"weights": last["state_dict"], "optimizer": last["optimizer_states"][0]["state"], "place": place}


def assert_same(one: Any, other: Any, place: str) -> None:
    """Equal to the last bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), (place, one.keys() ^ other.keys())
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place
