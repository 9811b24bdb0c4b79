from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_support import load_entry

from mg3d.mim_cells import cell_grid, reference_cells
from mg3d.models.masking import apply_mask, cells_to_voxels


def test_reference_draw_is_the_recorded_one(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "mask_rand_patch.json").read_text(encoding="utf-8"))
    assert cases
    for case in cases:
        grid = cell_grid(case["dhw"], case["window"])
        np.random.seed(case["numpy_seed"])
        from_global = reference_cells(grid, case["ratio"])
        from_own = reference_cells(grid, case["ratio"], np.random.RandomState(case["numpy_seed"]))
        assert np.flatnonzero(from_global).tolist() == case["masked_cells"]
        assert np.array_equal(from_global, from_own)


def test_masked_image_is_the_recorded_one(golden_dir: Path) -> None:
    tensors, record = load_entry(golden_dir, "loss_mim")
    config = record["config"]
    grid = cell_grid(config["dhw"], config["window"])
    cells = torch.from_numpy(reference_cells(grid, config["ratio"], np.random.RandomState(config["numpy_seed"])))
    voxels = cells_to_voxels(cells, config["dhw"], config["window"])
    assert torch.equal(voxels, tensors["in.mask"].bool())
    volume = tensors["in.target_bdchw"].transpose(1, 2)
    assert torch.equal(apply_mask(volume, cells, config["window"]), tensors["masked_image"])


def test_voxels_follow_their_cell_also_at_odd_sizes() -> None:
    size, window = (10, 7, 9), 4
    assert cell_grid(size, window) == (3, 2, 3)
    cells = torch.arange(18).view(1, 3, 2, 3)
    voxels = cells_to_voxels(cells, size, window)
    assert voxels.shape == (1, *size)
    d, h, w = np.indices(size) // window
    assert np.array_equal(voxels[0].numpy(), cells[0].numpy()[d, h, w])


def test_each_sample_gets_its_own_mask() -> None:
    volume = torch.rand(2, 1, 4, 4, 4) + 0.5
    cells = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    cells[0, 0, 0, 0] = True
    masked = apply_mask(volume, cells, 2)
    assert torch.equal(masked[1], volume[1])
    assert int((masked[0] == 0).sum()) == 8 and float(masked[0, 0, :2, :2, :2].abs().max()) == 0


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="ratio"):
        reference_cells((2, 2, 2), 1.5)
    with pytest.raises(ValueError, match="positive"):
        cell_grid((32, 32, 0), 16)
    with pytest.raises(ValueError, match="does not fit"):
        cells_to_voxels(torch.zeros(2, 2, 2), (64, 64, 64))
