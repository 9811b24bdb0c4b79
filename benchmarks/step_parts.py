"""Attribution of a training step's wall time to its parts, forward and backward.

Autograd runs the backward pass in the reverse order of the forward pass. Identity operations at the inputs and outputs
of a call therefore mark its time in both passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.models.network import MG3DNetwork

REST = "losses"
PARTS = ("vision", "text", "fusion", "heads", REST, "optimiser")


class PartClock:
    """Adds the time since the last switch to the part that was running; everything unnamed counts as losses."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new step."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = REST, time.perf_counter()

    def switch(self, part: str) -> str:
        """Charge the running part, go on with another one; returns the part that ran."""
        now, before = time.perf_counter(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def attach(self, net: MG3DNetwork) -> None:
        """Time the calls of a network that belong to a part."""
        for part, owner, method in part_calls(net):
            setattr(owner, method, self._timed(getattr(owner, method), part))

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            before = self.switch(part)
            found = call(*(self._marked(value, before) for value in args), **options)
            many = isinstance(found, tuple)
            found = tuple(self._marked(v, part) for v in found) if many else self._marked(found, part)
            self.switch(before)
            return found

        return run

    def _marked(self, value: Any, part: str) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return _Mark.apply(value, self, part)
        return value


class _Mark(torch.autograd.Function):
    """Identity; its backward switches the clock to a part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, clock: PartClock, part: str) -> Tensor:
        ctx.clock, ctx.part = clock, part
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.switch(ctx.part)
        return grad, None, None


def part_calls(net: MG3DNetwork) -> Iterator[tuple[str, nn.Module, str]]:
    """Part, owner and method of every timed call."""
    yield "vision", net.vision_encoder, "tokens"
    for method in ("embed", "contextualize"):
        yield "text", net.language_encoder, method
    for method in ("project_image", "project_text", "fuse_report", "fuse_sentences"):
        yield "fusion", net, method
    for module in (net.uni_global_text_attention, net.multi_global_text_attention):
        yield "fusion", module, "forward"
    for layer in net.agg_img_cross_attention:
        yield "fusion", layer, "gate_each"
    for method in ("vocabulary_logits", "sentence_features"):
        yield "heads", net.mlm_head, method
    poolers = (net.uni_modal_vision_pooler, net.multi_modal_vision_pooler, net.multi_modal_agg_vision_pooler)
    heads = (net.multi_modal_sen_vision_pooler, net.uni_emd_sen, net.mlm_head.transform, net.mim_swin_unter_head)
    for module in (*poolers, *heads):
        yield "heads", module, "forward"
    for head in (net.itc_cross_head, net.itc_agg_head):
        for method in ("embed_image", "embed_text"):
            yield "heads", head, method
