"""The fusion as loops over samples, sentences and tokens, against the closed form.

Two loop forms: per sentence and per token, where every pair of tokens is gated on its own; and the published one, that
takes one sample at a time and builds, row by row, a ``[T, I, C]`` tensor which is then averaged. In both the
aggregation calls its layer once per sentence (spec 7.2 and 8.A to 8.C). They are compared with the shipped form in
value and gradient, and all are timed.

Shape legend: B batch, I and T tokens of the two sides of a layer, N image tokens, L text tokens, S sentences, C hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Timing, interleave
from benchmarks.step_setup import Sizes, make_batch
from mg3d.models.fusion import MIMCrossAttention, MLMCrossAttention, UnidirectionalCrossAttention
from mg3d.models.pooling import masked_mean, sentence_gather

VOXELS_PER_TOKEN = 32
LAYERS = 2
TURN_S = 0.5


class FusionLayers(nn.Module):
    """The layers that fuse image and report in all three objectives.

    Args:
        hidden: channels C.
        text_len: L.
        image_tokens: N.
    """

    def __init__(self, hidden: int, text_len: int, image_tokens: int) -> None:
        super().__init__()
        self.report = nn.ModuleList(MLMCrossAttention(hidden, text_len, image_tokens) for _ in range(LAYERS))
        self.sentences = nn.ModuleList(MIMCrossAttention(hidden, image_tokens) for _ in range(LAYERS))
        self.aggregate = nn.ModuleList(UnidirectionalCrossAttention(hidden) for _ in range(LAYERS))


Gate = Callable[[Tensor, Tensor], Tensor]
Fuse = Callable[[FusionLayers, Tensor, Tensor, Tensor], list[Tensor]]


# ---------------------------------------------------------------- closed form, as shipped
def fuse_closed(layers: FusionLayers, text_BLC: Tensor, image_BNC: Tensor, index_BL: Tensor) -> list[Tensor]:
    """Fusion of all three objectives, batched.

    Returns:
        Fused report and image of word masking, fused image of image masking, fused image and sentences of the local
        contrast, and the aggregated sentences.
    """
    found = []
    for kept in (2, 1):
        text, image = text_BLC, image_BNC
        for layer in layers.report:
            text, _, image, _ = layer(text, image)
        found += [image, text][:kept]
    sentences, mask = sentence_gather(text_BLC, index_BL)
    image, gated = image_BNC, sentences
    for layer in layers.sentences:
        image, _, gated, _ = layer(image, gated, mask_b_BT=mask)
    found += [image, gated]
    centre_B1C, gated = image_BNC.mean(dim=1, keepdim=True), sentences
    for layer in layers.aggregate:
        gated, _ = layer.gate_each(gated, centre_B1C, mask)
        centre_B1C = masked_mean(gated, mask).unsqueeze(1)
    return [*found, gated]


# ---------------------------------------------------------------- loops
def gate_pairs(gates_TI: Tensor, value_TC: Tensor) -> Tensor:
    """Scale every token by each of its gates, pair after pair, and average: ``[T, C]``."""
    rows = []
    for gates_I, value_C in zip(gates_TI, value_TC, strict=True):
        rows.append(torch.stack([gate * value_C for gate in gates_I]).mean(dim=0))
    return torch.stack(rows)


def gate_rows(gates_TI: Tensor, value_TC: Tensor) -> Tensor:
    """The same token after token, through ``[T, I, C]``, as published."""
    rows = [gates_I.unsqueeze(1) * value_C.unsqueeze(0) for gates_I, value_C in zip(gates_TI, value_TC, strict=True)]
    return torch.stack(rows).mean(dim=1)


def cross_sample(layer: nn.Module, a_IC: Tensor, b_TC: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """One bidirectional layer on one sample; returns the new a and b."""
    scale = a_IC.shape[-1] ** -0.5
    probs1_TI = torch.sigmoid(layer.query2(b_TC) @ layer.key1(a_IC).t() * scale)
    probs2_IT = torch.sigmoid(layer.query1(a_IC) @ layer.key2(b_TC).t() * scale)
    return gate(probs2_IT, layer.value1(a_IC)), gate(probs1_TI, layer.value2(b_TC))


def sentences_by_token(text_LC: Tensor, index_L: Tensor) -> Tensor:
    """Mean of the tokens of every sentence, collected token after token: ``[S, C]``."""
    rows: dict[int, list[Tensor]] = {}
    for number, token_C in zip(index_L.tolist(), text_LC, strict=True):
        if number > 0:
            rows.setdefault(number, []).append(token_C)
    return torch.stack([torch.stack(rows[number]).mean(dim=0) for number in sorted(rows)])


def aggregate_by_sentence(layers: Sequence[nn.Module], sentences_SC: Tensor, image_NC: Tensor) -> Tensor:
    """Gate one sentence after the other by the image vector: ``[S, C]``."""
    centre_1C = image_NC.mean(dim=0, keepdim=True)
    for layer in layers:
        rows = []
        for sentence_1C in sentences_SC.split(1):
            gate_11 = torch.sigmoid(layer.query2(centre_1C) @ layer.key1(sentence_1C).t() * centre_1C.shape[1] ** -0.5)
            rows.append(gate_11 @ layer.value1(sentence_1C))
        sentences_SC = torch.cat(rows)
        centre_1C = sentences_SC.mean(dim=0, keepdim=True)
    return sentences_SC


def fuse_loops(
    layers: FusionLayers, text_BLC: Tensor, image_BNC: Tensor, index_BL: Tensor, gate: Gate = gate_pairs
) -> list[Tensor]:
    """The same as :func:`fuse_closed`, sample by sample; every report must have the same number of sentences."""
    samples = [_fuse_sample(layers, *sample, gate) for sample in zip(text_BLC, image_BNC, index_BL, strict=True)]
    return [torch.stack(parts) for parts in zip(*samples, strict=True)]


def _fuse_sample(layers: FusionLayers, text_LC: Tensor, image_NC: Tensor, index_L: Tensor, gate: Gate) -> list[Tensor]:
    found = []
    for kept in (2, 1):
        text, image = text_LC, image_NC
        for layer in layers.report:
            text, image = cross_sample(layer, text, image, gate)
        found += [image, text][:kept]
    sentences = sentences_by_token(text_LC, index_L)
    image, gated = image_NC, sentences
    for layer in layers.sentences:
        image, gated = cross_sample(layer, image, gated, gate)
    return [*found, image, gated, aggregate_by_sentence(list(layers.aggregate), sentences, image_NC)]


FORMS: dict[str, Fuse] = {
    "closed": fuse_closed,
    "loops": fuse_loops,
    "published": partial(fuse_loops, gate=gate_rows),
}


# ---------------------------------------------------------------- comparison
def compare_fusion(sizes: Sizes, studies: int, rounds: int) -> dict[str, Any]:
    """Check that all forms agree in value and gradient, and time their forward and backward passes.

    The linear projections of the layers are the same work in every form. They are replaced by identities for the plain
    figures, so that these compare what differs: gates, gated averages, sentences, aggregation. Figures of the whole
    layers stand beside them.

    Args:
        sizes: of tokens and channels.
        studies: batch size B.
        rounds: timed turns of each form.

    Returns:
        ``seconds`` and ``layers_seconds`` by form, and ``largest_difference`` of values and gradients, relative to the
        largest value of the same tensor.
    """
    tokens = math.prod(edge // VOXELS_PER_TOKEN for edge in sizes.volume)
    layers = FusionLayers(sizes.hidden, sizes.text_len, tokens)
    text = torch.randn(studies, sizes.text_len, sizes.hidden, requires_grad=True)
    image = torch.randn(studies, tokens, sizes.hidden, requires_grad=True)
    inputs = (text, image, make_batch(sizes, studies)["sentence_index"])
    result: dict[str, Any] = {"largest_difference": 0.0}
    for key, chosen in (("seconds", without_projections(layers)), ("layers_seconds", layers)):
        runs = {form: partial(_both_passes, fuse, chosen, *inputs) for form, fuse in FORMS.items()}
        expected = runs["closed"]()
        differences = [_largest_difference(runs[form](), expected) for form in FORMS]
        result["largest_difference"] = max(result["largest_difference"], *differences)
        result[key] = Timing.fastest(interleave(runs, rounds, TURN_S), "wall")
    return result


def without_projections(layers: FusionLayers) -> FusionLayers:
    """Copy of the layers whose queries, keys and values are their inputs."""
    bare = copy.deepcopy(layers)
    for layer in (*bare.report, *bare.sentences, *bare.aggregate):
        for name in ("query1", "key1", "value1", "query2", "key2", "value2"):
            if hasattr(layer, name):
                setattr(layer, name, nn.Identity())
    return bare


def _both_passes(fuse: Fuse, layers: FusionLayers, text: Tensor, image: Tensor, index: Tensor) -> list[Tensor]:
    """Fused tensors, and the gradients of the sum of their squares."""
    found = fuse(layers, text, image, index)
    total = torch.stack([each.square().sum() for each in found]).sum()
    inputs = [text, image, *(weight for name, weight in layers.named_parameters() if ".fc" not in name)]
    return [*found, *torch.autograd.grad(total, inputs)]


def _largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).detach().abs().max() / other.detach().abs().max()) for one, other in pairs)
