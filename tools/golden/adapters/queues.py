"""Memory queues after a sequence of stored enqueues."""

from __future__ import annotations

import torch
from torch import nn

from mg3d.models.memory_queues import CrossBatchMemory, MoCoQueue, MoCoSentenceQueue
from tools.golden.bundle import Bundle


def _batches(bundle: Bundle, prefix: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    count = len(bundle.names(f"{prefix}.in1."))
    return [tuple(bundle.read(f"{prefix}.in{side}.{step}") for side in (1, 2)) for step in range(count)]


def _start(bundle: Bundle, prefix: str, buffer: str, steps: int) -> torch.Tensor:
    """Content before the first enqueue.

    A recording that kept a view of the live buffer shows the last state as "init"; rows the first batch does not write
    are then known from the first snapshot, and the others do not matter.
    """
    recorded = bundle.read(f"{prefix}.init.{buffer}")
    if torch.equal(recorded, bundle.peek(f"{prefix}.after{range(steps)[-1]}.{buffer}")):
        return bundle.peek(f"{prefix}.after0.{buffer}")
    return recorded


def _ring(bundle: Bundle, prefix: str, queue: nn.Module) -> None:
    batches = _batches(bundle, prefix)
    for buffer in ("queue_1", "queue_2"):
        queue.get_buffer(buffer).copy_(_start(bundle, prefix, buffer, len(batches)))
    for step, (first, second) in enumerate(batches):
        queue.enqueue(first, second)
        bundle.check(f"{prefix}.after{step}.queue_1", queue.queue_1)
        bundle.check(f"{prefix}.after{step}.queue_2", queue.queue_2)
        bundle.check(f"{prefix}.after{step}.ptr", torch.cat([queue.queue_1_ptr, queue.queue_2_ptr]))


def memory_queues(bundle: Bundle) -> None:
    """Ring buffers and the cross-batch memory."""
    size = bundle.config["K"]
    width = bundle.read("moco.init.queue_1").shape[1]
    _ring(bundle, "moco", MoCoQueue(size, width))
    widths = [bundle.read(f"moco_ssm.init.queue_{side}").shape[1] for side in (1, 2)]
    _ring(bundle, "moco_ssm", MoCoSentenceQueue(size, *widths))
    batches = _batches(bundle, "xbm")
    memory = CrossBatchMemory(size, *(side.shape[1] for side in batches[0]))
    for step, (first, second) in enumerate(batches):
        memory.enqueue(first, second)
        stored = memory.get()
        bundle.check(f"xbm.after{step}.get_1", stored[0])
        bundle.check(f"xbm.after{step}.get_2", stored[1])
        bundle.check(f"xbm.after{step}.ptr", memory.queue_ptr)
