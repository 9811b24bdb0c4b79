"""One subject of ``pretrain_step.py`` in a process of its own: ``python -m benchmarks.step_subjects --subject NAME``.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.nets.swin_unetr import SwinTransformer

from benchmarks.harness import Timing, interleave, memory_gib
from benchmarks.loop_fusion import compare_fusion
from benchmarks.step_parts import REST, PartClock
from benchmarks.step_setup import SIZES, Sizes, TrainingStep
from mg3d.models.heads import MIMHead

MEMORY_STEPS = 2  # the second one runs with the optimizer's state in place


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of training steps."""
    imported = memory_gib("VmRSS")
    sizes = SIZES[options.size]
    step = TrainingStep(sizes, options.batch, bool(options.checkpointed))
    seconds = []
    for _ in range(MEMORY_STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = memory_gib("VmHWM")
    return {"step_s": seconds[-1], "total_gib": peak, "beyond_imports_gib": peak - imported}


class ReferenceWork:
    """The least a step must do: 2 MONAI Swin and 1 decoder, forward and backward, and 2 text encodings.

    Args:
        step: whose text encoder and batch are used.
        sizes: of the modules.
    """

    def __init__(self, step: TrainingStep, sizes: Sizes) -> None:
        self.text = step.net.language_encoder
        self.ids, self.mask = step.batch["text_ids"], step.batch["text_masks"]
        self.volume = step.batch["image"].transpose(1, 2).contiguous()
        self.swin = SwinTransformer(
            in_chans=1,
            embed_dim=sizes.embed_dim,
            window_size=(sizes.window,) * 3,
            patch_size=(2, 2, 2),
            depths=(2, 2, 2, 2),
            num_heads=(3, 6, 12, 24),
        )
        self.decoder = MIMHead(sizes.hidden)
        self.grid = torch.randn(len(self.volume), sizes.hidden, *step.net.token_grid, requires_grad=True)

    def __call__(self) -> None:
        """Do the work once."""
        for _ in range(2):
            tokens = self.swin(self.volume)[-1]
            tokens.backward(torch.ones_like(tokens))
            with torch.no_grad():
                self.text(self.ids, self.mask)
        volume = self.decoder(self.grid)
        volume.backward(torch.ones_like(volume))
        for module in (self.swin, self.decoder):
            module.zero_grad(set_to_none=True)
        self.grid.grad = None


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, by part, and its ratio to the reference work."""
    step = TrainingStep(SIZES[options.size], options.batch, bool(options.checkpointed))
    reference = ReferenceWork(step, SIZES[options.size])
    clock = PartClock()
    clock.attach(step.net)
    parts: list[dict[str, float]] = []

    def timed_step() -> None:
        clock.restart()
        step.losses()
        clock.switch("optimiser")
        step.update()
        clock.switch(REST)
        parts.append(dict(clock.seconds))

    timings = interleave({"step": timed_step, "reference": reference}, options.rounds)
    wall, cpu = Timing.fastest(timings, "wall"), Timing.fastest(timings, "cpu")
    return {
        "step_s": wall["step"],
        "reference_s": wall["reference"],
        "overhead_ratio": wall["step"] / wall["reference"],
        "overhead_ratio_cpu": cpu["step"] / cpu["reference"],
        "step_cpu_s": cpu["step"],
        "parts_s": min(parts[-options.rounds :], key=lambda each: sum(each.values())),
        "rounds_s": {name: [each.wall for each in found] for name, found in timings.items()},
    }


def fusion(options: argparse.Namespace) -> dict[str, Any]:
    """Closed form of the fusion against loops: largest difference and seconds."""
    torch.manual_seed(0)
    return compare_fusion(SIZES[options.size], options.batch, options.rounds)


SUBJECTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "memory": memory,
    "speed": speed,
    "fusion": fusion,
}


def main() -> None:
    """Run the subject named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=SUBJECTS, required=True)
    parser.add_argument("--size", choices=SIZES, default="published")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(SUBJECTS[options.subject](options) | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
