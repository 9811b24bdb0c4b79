"""Cross attention between two token sets by sigmoid gates, in closed form (spec 7.2).

The published layers build a ``[T, I, C]`` tensor per sample inside Python loops. In its "mean" form no value crosses
from one modality to the other: every token keeps its own value, scaled by the mean of its gates; so a sum over the
gates is enough. All forms here are batched, take masks for padded positions and never build ``[B, I, T, C]``.

Axes: B batch, I tokens of the first set (a), T tokens of the second (b), C channels. ``mask_*`` are bool, True =
valid; a masked position contributes nothing and its own outputs are zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from mg3d.models.pooling import SentenceAttentionPool

FUSION_VARIANTS = ("mean", "unet", "ctrate")
FusionOutput = tuple[Tensor, Tensor, Tensor, Tensor]


def sigmoid_gates(
    query_BTC: Tensor, key_BIC: Tensor, mask_query_BT: Tensor | None = None, mask_key_BI: Tensor | None = None
) -> Tensor:
    """Gates ``sigmoid(q k^T / sqrt(C))``, zero wherever either side is masked.

    Args:
        query_BTC: ``[B, T, C]``.
        key_BIC: ``[B, I, C]``.
        mask_query_BT: bool ``[B, T]`` or None.
        mask_key_BI: bool ``[B, I]`` or None.

    Returns:
        ``[B, T, I]`` in (0, 1).
    """
    gates = torch.sigmoid(query_BTC @ key_BIC.mT * query_BTC.shape[-1] ** -0.5)
    if mask_query_BT is not None:
        gates = gates.masked_fill(~mask_query_BT.unsqueeze(2), 0.0)
    if mask_key_BI is not None:
        gates = gates.masked_fill(~mask_key_BI.unsqueeze(1), 0.0)
    return gates


def mean_gated(value_BTC: Tensor, gates_BTI: Tensor, mask_BI: Tensor | None) -> Tensor:
    """``v[t] * mean_i P[t, i]`` over the valid i ("mean" form)."""
    if mask_BI is None:
        return value_BTC * gates_BTI.mean(dim=-1, keepdim=True)
    count = mask_BI.sum(dim=1).clamp(min=1).to(gates_BTI.dtype).view(-1, 1, 1)
    return value_BTC * (gates_BTI.sum(dim=2, keepdim=True) / count)


def weight_gated(value_BTC: Tensor, gates_BTI: Tensor, linear: nn.Linear, mask_BT: Tensor | None) -> Tensor:
    """``v[t] * sum_i w_i P[t, i] + bias`` with the learned weights of ``linear`` (I -> 1).

    Raises:
        ValueError: the layer was built for another number of tokens.
    """
    if gates_BTI.shape[2] != linear.in_features:
        raise ValueError(
            f"{gates_BTI.shape[2]} tokens given, the fusion layer was built for {linear.in_features}: "
            "pass the right num_a / num_b, or use fusion_variant=mean"
        )
    context = value_BTC * functional.linear(gates_BTI, linear.weight) + linear.bias
    return context if mask_BT is None else context.masked_fill(~mask_BT.unsqueeze(2), 0.0)


class _CrossAttention(nn.Module, ABC):
    """The six projections and both gate matrices that the bidirectional layers share."""

    def __init__(self, hidden: int, variant: str) -> None:
        super().__init__()
        if variant not in FUSION_VARIANTS:
            raise ValueError(f"fusion variant {variant!r} is unknown: choose one of {', '.join(FUSION_VARIANTS)}")
        self.variant = variant
        self.query1 = nn.Linear(hidden, hidden)
        self.key1 = nn.Linear(hidden, hidden)
        self.value1 = nn.Linear(hidden, hidden)
        self.query2 = nn.Linear(hidden, hidden)
        self.key2 = nn.Linear(hidden, hidden)
        self.value2 = nn.Linear(hidden, hidden)

    def forward(
        self, a_BIC: Tensor, b_BTC: Tensor, mask_a_BI: Tensor | None = None, mask_b_BT: Tensor | None = None
    ) -> FusionOutput:
        """Fuse two token sets; without masks B may be several axes that broadcast.

        Args:
            a_BIC: first set ``[B, I, C]``.
            b_BTC: second set ``[B, T, C]``.
            mask_a_BI: bool ``[B, I]`` or None.
            mask_b_BT: bool ``[B, T]`` or None.

        Returns:
            context2 ``[B, I, C]`` (new a), probs2 ``[B, I, T]``, context1 ``[B, T, C]`` (new b), probs1 ``[B, T, I]``.

        Raises:
            ValueError: a token count differs from the one a learned sum was built for.
        """
        probs1 = sigmoid_gates(self.query2(b_BTC), self.key1(a_BIC), mask_b_BT, mask_a_BI)
        probs2 = sigmoid_gates(self.query1(a_BIC), self.key2(b_BTC), mask_a_BI, mask_b_BT)
        context1 = self._context1(self.value2(b_BTC), probs1, mask_a_BI, mask_b_BT)
        context2 = self._context2(self.value1(a_BIC), probs2, mask_a_BI, mask_b_BT)
        return context2, probs2, context1, probs1

    @abstractmethod
    def _context1(self, value: Tensor, probs: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
        """New b from its values and gates."""

    @abstractmethod
    def _context2(self, value: Tensor, probs: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
        """New a from its values and gates."""


class MLMCrossAttention(_CrossAttention):
    """Fusion of the masked-language branch: a = text tokens, b = image tokens (spec 7.2, ``MLMCross``).

    Variants: ``mean``: both contexts by the mean gate; ``unet``: context2 by the learned sum ``fc2``; ``ctrate``:
    context1 by ``fc1`` and context2 by ``fc2``. Both layers always exist, as in published checkpoints.

    Args:
        hidden: channels C.
        num_a: tokens I that ``fc1`` is built for.
        num_b: tokens T that ``fc2`` is built for.
        variant: one of `FUSION_VARIANTS`.
    """

    def __init__(self, hidden: int, num_a: int, num_b: int, variant: str = "mean") -> None:
        super().__init__(hidden, variant)
        self.fc1 = nn.Linear(num_a, 1)
        self.fc2 = nn.Linear(num_b, 1)

    def _context1(self, value: Tensor, probs: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
        if self.variant == "ctrate":
            return weight_gated(value, probs, self.fc1, mask_b)
        return mean_gated(value, probs, mask_a)

    def _context2(self, value: Tensor, probs: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
        if self.variant == "mean":
            return mean_gated(value, probs, mask_b)
        return weight_gated(value, probs, self.fc2, mask_a)


class MIMCrossAttention(_CrossAttention):
    """Fusion of the local contrast branch (``MIMCross``): a = image tokens, b = sentences (spec 7.2).

    Variants: ``mean``: both contexts by the mean gate; ``unet``: context1 by the learned sum ``fc1``, context2 by the
    attention pool ``fc2`` over the rows P2[i, t] v1[i]; ``ctrate``: context1 by the mean gate, context2 by the
    attention pool.

    Args:
        hidden: channels C.
        num_a: tokens I that ``fc1`` is built for.
        variant: one of `FUSION_VARIANTS`.
        num_heads: heads of the attention pool.
    """

    def __init__(self, hidden: int, num_a: int, variant: str = "mean", num_heads: int = 8) -> None:
        super().__init__(hidden, variant)
        self.fc1 = nn.Linear(num_a, 1)
        self.fc2 = SentenceAttentionPool(32, hidden, num_heads)

    def _context1(self, value: Tensor, probs: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
        if self.variant == "unet":
            return weight_gated(value, probs, self.fc1, mask_b)
        return mean_gated(value, probs, mask_a)

    def _context2(self, value: Tensor, probs: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
        if self.variant == "mean":
            return mean_gated(value, probs, mask_b)
        pooled = self.fc2.pool_scaled_row(value, probs, mask_b)
        return pooled if mask_a is None else pooled.masked_fill(~mask_a.unsqueeze(2), 0.0)


class UnidirectionalCrossAttention(nn.Module):
    """One-way fusion: keys and values of a, queries of b (spec 7.2, ``Unidir_LocalCrossAttention``).

    Args:
        hidden: channels C.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.key1 = nn.Linear(hidden, hidden)
        self.value1 = nn.Linear(hidden, hidden)
        self.query2 = nn.Linear(hidden, hidden)

    def forward(
        self, a_BIC: Tensor, b_BTC: Tensor, mask_a_BI: Tensor | None = None, mask_b_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend from b to a (arguments as the other layers): context1 = P1 v1 ``[B, T, C]``, probs1 ``[B, T, I]``."""
        probs1 = sigmoid_gates(self.query2(b_BTC), self.key1(a_BIC), mask_b_BT, mask_a_BI)
        return probs1 @ self.value1(a_BIC), probs1

    def gate_each(self, a_BIC: Tensor, b_B1C: Tensor, mask_a_BI: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend from the one row of b to every row of a on its own: ``a_i <- P1[i] v1[i]``.

        Equal to calling the layer once per row of a (spec 8.C.6, the aggregation of sentences around the global image
        feature).

        Args:
            a_BIC: ``[B, I, C]``.
            b_B1C: ``[B, 1, C]``.
            mask_a_BI: bool ``[B, I]`` or None.

        Returns:
            ``[B, I, C]`` (masked rows zero) and the gates ``[B, I]``.
        """
        probs_B1I = sigmoid_gates(self.query2(b_B1C), self.key1(a_BIC), None, mask_a_BI)
        return probs_B1I.transpose(1, 2) * self.value1(a_BIC), probs_B1I.squeeze(1)
