"""Seeded masks and the learning-rate schedule."""

from __future__ import annotations

import numpy as np

from mg3d.mim_cells import cell_grid, reference_cells
from mg3d.models.optimization import schedule_factor
from tools.golden.bundle import Bundle


def cell_masks(bundle: Bundle) -> None:
    """Masked cells of each seed."""
    for entry in bundle.bodies():
        for position, case in enumerate(entry.body):
            bundle.read_json(entry, *(f"{position}/{key}" for key in ("numpy_seed", "dhw", "ratio", "window")))
            generator = np.random.RandomState(case["numpy_seed"])
            grid = cell_grid(case["dhw"], case["window"])
            cells = reference_cells(grid, case["ratio"], generator)
            bundle.check_json(entry, f"{position}/masked_cells", np.flatnonzero(cells).tolist())
            bundle.check_json(entry, f"{position}/num_cells", int(np.prod(grid)))


def learning_rates(bundle: Bundle) -> None:
    """Factor and rates at the stored steps; the rate columns are read off an optimiser driven by the schedule."""
    for entry in bundle.bodies():
        for position, case in enumerate(entry.body):
            keys = ("kind", "base_lr", "warmup", "total", "lr_end", "power")
            bundle.read_json(entry, *(f"{position}/{key}" for key in keys))
            for row, value in enumerate(case["values"]):
                path = f"{position}/values/{row}"
                bundle.read_json(entry, f"{path}/step")
                factor = schedule_factor(
                    value["step"],
                    total_steps=case["total"],
                    warmup_steps=case["warmup"],
                    decay_power="cosine" if case["kind"] == "cosine" else case["power"],
                    base_lr=case["base_lr"],
                    end_lr=case["lr_end"],
                )
                bundle.check_json(entry, f"{path}/factor", float(factor))
                bundle.check_rates(entry, path, case["base_lr"], factor)
