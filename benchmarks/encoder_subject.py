"""One encoder of ``encoder_table.py`` in a process of its own; the last line is one JSON object.

    python -m benchmarks.encoder_subject --encoder swin_b --mode both --size 128x96x128

Modes: ``forward`` (without gradients, also counts floating-point operations) and ``both`` (forward and backward).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.encoder_table import MODES, MONAI
from benchmarks.harness import Timing, memory_gib
from mg3d.models.vision_encoders import VisionEncoder, create_vision_encoder
from mg3d.models.vision_encoders.base import channel_norm, map_to_tokens


class MonaiTokens(nn.Module):
    """MONAI's own Swin transformer of Swin-B's size, up to the same tokens."""

    def __init__(self) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer

        super().__init__()
        self.swin = SwinTransformer(
            in_chans=1,
            embed_dim=48,
            window_size=(7, 7, 7),
            patch_size=(2, 2, 2),
            depths=(2, 2, 2, 2),
            num_heads=(3, 6, 12, 24),
            spatial_dims=3,
        )

    def tokens(self, vol_B1DHW: Tensor) -> Tensor:
        """Normalised last map as tokens ``[B, N, E]``."""
        return map_to_tokens(channel_norm(self.swin(vol_B1DHW, normalize=False)[-1]))


def build(name: str, **options: Any) -> MonaiTokens | VisionEncoder:
    """The encoder of a row of the table, in training mode."""
    torch.manual_seed(0)
    return (MonaiTokens() if name == MONAI else create_vision_encoder(name, **options)).train()


def count(encoder: MonaiTokens | VisionEncoder, volume: Tensor) -> dict[str, Any]:
    """Tokens and floating-point operations of one forward pass: products and convolutions, two per multiply-add."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the counter sees only the thread that it was started in
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tokens = encoder.tokens(volume)
    finally:
        torch.set_num_threads(threads)
    return {"tokens": list(tokens.shape[1:]), "gflops": counter.get_total_flops() / 1e9}


def timed(call: Callable[[], object]) -> Timing:
    """Wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def measure(name: str, mode: str, size: tuple[int, ...], calls: int = 2, **options: Any) -> dict[str, Any]:
    """Peak memory beyond the imports, and the fastest of some calls after a first one.

    Args:
        name: registry name, or ``MONAI``.
        mode: one of ``MODES``.
        size: (D, H, W) of the volume.
        calls: calls in all, at least 2.
        **options: of the encoder.
    """
    start_gib = memory_gib("VmRSS")
    encoder, volume = build(name, **options), torch.rand(1, 1, *size)

    def forward() -> None:
        with torch.no_grad():
            encoder.tokens(volume)

    def both() -> None:
        encoder.zero_grad(set_to_none=True)
        encoder.tokens(volume).square().mean().backward()

    turns = [timed(both if mode == "both" else forward) for _ in range(calls)][1:]
    found = {"peak_gib": memory_gib("VmHWM") - start_gib, "total_gib": memory_gib("VmHWM")}
    found |= {"wall_s": min(turn.wall for turn in turns), "cpu_s": min(turn.cpu for turn in turns)}
    if mode == "forward":
        found |= count(encoder, volume)
    return found | {"parameters": sum(parameter.numel() for parameter in encoder.parameters())}


def main() -> None:
    """Measure the encoder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--size", default="128x96x128")
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    size = tuple(int(edge) for edge in options.size.split("x"))
    found = measure(options.encoder, options.mode, size, options.calls)
    print(json.dumps(found | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
