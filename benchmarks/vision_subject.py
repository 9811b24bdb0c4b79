"""One process of ``vision_encoder.py``: an encoder's seconds and memory, or the difference of the two encoders."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from benchmarks.harness import memory_gib
from mg3d.models.vision_encoders import create_vision_encoder

WARM_UP_CALLS = 3
TIMED_CALLS = 3


def build(encoder: str, seed: int = 0) -> nn.Module:
    """Swin-B with ``fixed`` merging, which is MONAI's own order, and the same random weights for both.

    Args:
        encoder: ``ours`` or ``monai``.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    ours = create_vision_encoder("swin_b", patch_merging="fixed")
    for name, parameter in ours.named_parameters():
        if "bias" in name:  # zero-initialised biases would hide mistakes
            nn.init.normal_(parameter, std=0.02)
    if encoder == "ours":
        return ours
    monai = SwinTransformer(
        in_chans=1,
        embed_dim=48,
        window_size=(7, 7, 7),
        patch_size=(2, 2, 2),
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
        spatial_dims=3,
    )
    incompatible = monai.load_state_dict(ours.state_dict(), strict=False)
    if incompatible.unexpected_keys or not all(key.endswith("_index") for key in incompatible.missing_keys):
        raise RuntimeError(f"the two encoders do not share their names: {incompatible}")
    return monai


def seconds(call: Callable[[], object], calls: int = TIMED_CALLS) -> float:
    """Fastest of some calls, after as many that get the process its memory."""
    for _ in range(WARM_UP_CALLS):
        call()
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def measure(encoder: str, volume: Tensor, precision: str) -> dict[str, Any]:
    """Seconds of forward, and of forward and backward, and the peak memory of the latter."""
    before = memory_gib("VmRSS")
    network = build(encoder)

    def forward_backward() -> None:
        with autocast(precision):
            maps = network(volume)
        sum(each.float().square().mean() for each in maps).backward()  # type: ignore[union-attr]

    def forward() -> None:
        with torch.no_grad(), autocast(precision):
            network(volume)

    result = {"forward_backward_s": seconds(forward_backward)}
    peak = memory_gib("VmHWM")
    return result | {"forward_s": seconds(forward), "beyond_imports_gib": peak - before, "total_gib": peak}


def autocast(precision: str) -> torch.autocast:
    """Mixed precision for ``bfloat16``, nothing for ``float32``."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")


def difference(volume: Tensor, precision: str) -> dict[str, Any]:
    """Largest absolute difference of the five feature maps of both encoders."""
    with torch.no_grad(), autocast(precision):
        pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(build("ours")(volume), build("monai")(volume), strict=True))
    return {"max_abs_diff": max(float((one.float() - other.float()).abs().max()) for one, other in pairs)}


def main() -> None:
    """Measure one subject and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", choices=("ours", "monai", "difference"), required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", default="128,96,128")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    volume = torch.rand(1, 1, *map(int, options.size.split(",")), generator=torch.Generator().manual_seed(1))
    if options.encoder == "difference":
        result = difference(volume, options.precision)
    else:
        result = measure(options.encoder, volume, options.precision)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
