"""From stored slices and volumes to the pre-training crop."""

from __future__ import annotations

import json

import numpy as np
import torch

from mg3d.datasets.volume import (
    PRETRAIN_SIZE_DHW,
    ct_rate_offline_resample,
    ct_rate_online_crop_resize,
    ctrg_stack,
)
from tools.golden.bundle import Bundle


def ctrg(bundle: Bundle) -> None:
    """Slice stack: blocks are repeated to full slices, packed, and equal neighbours of the result collapsed."""
    config = bundle.config
    rows, columns = config["slice_hw"]
    block_rows, block_columns = config["block"]
    coarse = bundle.read("coarse_u8").numpy()
    slices = coarse.repeat(block_rows, axis=1).repeat(block_columns, axis=2)[:, :rows, :columns]
    depth = len(bundle.peek("slice_map"))
    size = (depth, *config["resize"])
    stack = ctrg_stack(list(slices), size, config["center_crop"], depth_range=config["crop_fraction"])
    out = torch.from_numpy(stack).squeeze(1)
    unique, position = torch.unique_consecutive(out, dim=0, return_inverse=True)
    bundle.check("unique_slices", unique)
    bundle.check("slice_map", position)


def ct_rate(bundle: Bundle) -> None:
    """Loading of a preprocessed volume; fractions are stored in the order of its axes (Z, X, Y).

    The size of the result is that of the stored one; where only a sample of it is stored, the pre-training size.
    """
    along_z, along_x, along_y = bundle.config["fractions"]
    size = bundle.config.get("size", PRETRAIN_SIZE_DHW)
    if bundle.has("out"):
        size = bundle.peek("out").squeeze(1).shape
    out = ct_rate_online_crop_resize(bundle.read("in.arr_0").numpy(), (along_z, along_y, along_x), size)
    bundle.check("out", torch.from_numpy(out))


def ct_rate_offline(bundle: Bundle) -> None:
    """Offline resampling of stored values with the metadata row's slope, intercept and spacing."""
    meta, target = bundle.config["meta"], bundle.config["target_spacing"]
    in_plane = json.loads(meta["XYSpacing"])[0]
    out = ct_rate_offline_resample(
        np.asarray(bundle.read("in.raw_xyz")),
        meta["RescaleSlope"],
        meta["RescaleIntercept"],
        (meta["ZSpacing"], in_plane, in_plane),
        (target["z"], target["xy"], target["xy"]),
    )
    bundle.check("out.arr_0", torch.from_numpy(out))
