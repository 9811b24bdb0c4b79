"""One process of ``sliding_window.py``: seconds and memory of a network over a volume, or how two networks differ."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn

from benchmarks.harness import memory_gib
from mg3d.models.finetune.decoders import build_segmenter
from mg3d.models.finetune.window_inference import WindowOptions, predict_probabilities
from mg3d.models.vision_encoders import create_vision_encoder
from mg3d.phantoms.canvas import Grid
from mg3d.phantoms.chest import ChestCase, render

CLASSES = 2
FIELD_MM = (300.0, 400.0, 400.0)


def build(network: str, feature_size: int) -> nn.Module:
    """SwinUNETR in evaluation mode with ``fixed`` merging, which is MONAI's own order, and the same random weights.

    Args:
        network: ``ours`` or ``monai``.
        feature_size: width.
    """
    torch.manual_seed(0)
    ours = build_segmenter(create_vision_encoder("swin_b", patch_merging="fixed", embed_dim=feature_size), CLASSES)
    if network == "ours":
        return ours.eval()
    monai = SwinUNETR(in_channels=1, out_channels=CLASSES, feature_size=feature_size)
    monai.load_state_dict(ours.state_dict())
    return monai.eval()


def chest(size_xyz: tuple[int, int, int]) -> Tensor:
    """A phantom chest in [0, 1], ``[1, 1, X, Y, Z]``."""
    shape = size_xyz[2], size_xyz[1], size_xyz[0]
    spacing = tuple(field / size for field, size in zip(FIELD_MM, shape, strict=True))
    hu = render(ChestCase(1, 2, ()), Grid(shape, (spacing[0], spacing[1], spacing[2]))).hu
    scaled = np.clip((hu.astype(np.float32) + 1000) / 1500, 0, 1).transpose(2, 1, 0)
    return torch.from_numpy(np.ascontiguousarray(scaled))[None, None]


def measure(network: str, volume: Tensor, windows: WindowOptions, feature_size: int) -> dict[str, Any]:
    """Seconds of one volume after a window that warms up, and the peak memory beyond the start."""
    gc.collect()
    with contextlib.suppress(OSError):  # Linux: the peak counts from here on, not the drawing of the phantom
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = memory_gib("VmRSS")
    net = build(network, feature_size)
    calls = 0

    def counted(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += len(batch)
        return net(batch)

    with torch.inference_mode():
        net(volume[:, :, : windows.roi[0], : windows.roi[1], : windows.roi[2]])
        started = time.perf_counter()
        predict_probabilities([counted], volume, windows)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "windows": calls, "peak_gib": memory_gib("VmHWM") - before}


def difference(volume: Tensor, windows: WindowOptions, feature_size: int) -> dict[str, Any]:
    """Largest absolute difference of the two networks' logits on the first window."""
    window = volume[:, :, : windows.roi[0], : windows.roi[1], : windows.roi[2]]
    with torch.inference_mode():
        ours, monai = (build(name, feature_size)(window) for name in ("ours", "monai"))
    return {"max_abs_diff": float((ours - monai).abs().max())}


def main() -> None:
    """Measure one subject and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=("ours", "monai", "difference"), required=True)
    parser.add_argument("--size", default="128,128,300")
    parser.add_argument("--roi", default="96,96,96")
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, roi = (tuple(map(int, text.split(","))) for text in (options.size, options.roi))
    volume = chest((size[0], size[1], size[2]))
    windows = WindowOptions((roi[0], roi[1], roi[2]), overlap=options.overlap, batch_size=1)
    if options.network == "difference":
        result = difference(volume, windows, options.feature_size)
    else:
        result = measure(options.network, volume, windows, options.feature_size)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
