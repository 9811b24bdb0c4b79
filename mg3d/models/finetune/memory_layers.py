"""Layers of the report generator: its layer norm, attention with cached keys, pre-norm encoder and decoder layers.

Shape suffixes: B batch, T queries, S keys, H heads, E model width, h width of one head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class UnbiasedNorm(nn.Module):
    """Layer norm of the published generator: a * (x - mean) / (unbiased standard deviation + 1e-6) + b.

    Args:
        width: E.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Normalise the last axis."""
        std, mean = torch.std_mean(x_BTE, dim=-1, keepdim=True)
        return self.weight * (x_BTE - mean) / (std + 1e-6) + self.bias


class CachedAttention(nn.Module):
    """Multi-head attention whose keys and values can be made apart from the queries, so that they can be kept.

    Args:
        width: E.
        heads: H; must divide E.
        dropout: of the attention weights.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def _split(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, h] of a sequence."""
        return self._split(self.key(x_BSE)), self._split(self.value(x_BSE))

    def attend(self, x_BTE: Tensor, keys_BHSh: Tensor, values_BHSh: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from a sequence to given keys.

        Args:
            x_BTE: queries.
            keys_BHSh: from :meth:`keys_values`.
            values_BHSh: from :meth:`keys_values`.
            mask: boolean, broadcastable to [B, H, T, S]; True may be seen.

        Returns:
            [B, T, E].
        """
        rate = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(
            self._split(self.query(x_BTE)), keys_BHSh, values_BHSh, attn_mask=mask, dropout_p=rate
        )
        return self.out(found.transpose(1, 2).flatten(2))

    def forward(self, x_BTE: Tensor, other_BSE: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from one sequence to another; returns [B, T, E]."""
        return self.attend(x_BTE, *self.keys_values(other_BSE), mask)


def feed_forward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Two linear layers with ReLU and dropout between."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, each with a residual.

    Args:
        width: E.
        heads: H.
        hidden: width of the feed-forward layer.
        dropout: rate everywhere.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = CachedAttention(width, heads, dropout)
        self.feed_forward = feed_forward(width, hidden, dropout)
        self.norm1, self.norm2 = UnbiasedNorm(width), UnbiasedNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode a sequence; ``mask`` as in :meth:`CachedAttention.attend`."""
        normed = self.norm1(x_BTE)
        x_BTE = x_BTE + self.dropout(self.attention(normed, normed, mask))
        return x_BTE + self.dropout(self.feed_forward(self.norm2(x_BTE)))


@dataclass
class PastWords:
    """Keys and values [N, H, T, h] of the words written so far, in buffers that are filled from the left."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys_NH1h: Tensor, values_NH1h: Tensor) -> tuple[Tensor, Tensor]:
        """Add one word; returns keys and values of all of them."""
        self.keys[:, :, self.length], self.values[:, :, self.length] = keys_NH1h[:, :, 0], values_NH1h[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder(self, rows_N: Tensor) -> None:
        """Give row k the past of row ``rows_N[k]``."""
        for buffer in (self.keys, self.values):
            buffer[:, :, : self.length] = buffer[rows_N, :, : self.length]


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and feed-forward, each with a residual.

    Args:
        width: E.
        heads: H.
        hidden: width of the feed-forward layer.
        dropout: rate everywhere.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = CachedAttention(width, heads, dropout)
        self.cross_attention = CachedAttention(width, heads, dropout)
        self.feed_forward = feed_forward(width, hidden, dropout)
        self.norm1, self.norm2, self.norm3 = UnbiasedNorm(width), UnbiasedNorm(width), UnbiasedNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTE: Tensor, image_BSE: Tensor, mask: Tensor) -> Tensor:
        """Decode whole sequences; ``mask`` [B, 1, T, T], True may be seen."""
        normed = self.norm1(x_BTE)
        x_BTE = x_BTE + self.dropout(self.self_attention(normed, normed, mask))
        return self._after_words(x_BTE, *self.cross_attention.keys_values(image_BSE))

    def next_word(self, x_N1E: Tensor, past: PastWords, image: tuple[Tensor, Tensor]) -> Tensor:
        """Decode one more word of N rows, given the keys and values of the past and of B images.

        The N / B rows of an image are the queries of one attention to its keys, which are never copied.
        """
        normed = self.norm1(x_N1E)
        keys, values = past.append(*self.self_attention.keys_values(normed))
        x_N1E = x_N1E + self.dropout(self.self_attention.attend(normed, keys, values))
        x_BKE = x_N1E.view(len(image[0]), -1, x_N1E.shape[-1])
        return self._after_words(x_BKE, *image).view_as(x_N1E)

    def _after_words(self, x_BTE: Tensor, keys_BHSh: Tensor, values_BHSh: Tensor) -> Tensor:
        x_BTE = x_BTE + self.dropout(self.cross_attention.attend(self.norm2(x_BTE), keys_BHSh, values_BHSh))
        return x_BTE + self.dropout(self.feed_forward(self.norm3(x_BTE)))


class WordEmbedding(nn.Module):
    """Learned vectors times the root of the width, plus sinusoidal positions.

    Args:
        words: number of ids.
        width: E, even.
        longest: most positions.
        dropout: rate.
    """

    positions: Tensor

    def __init__(self, words: int, width: int, longest: int, dropout: float) -> None:
        super().__init__()
        self.vectors = nn.Embedding(words, width)
        self.dropout = nn.Dropout(dropout)
        angle = torch.arange(longest)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        self.register_buffer("positions", waves, persistent=False)

    def forward(self, ids_BT: Tensor, first: int = 0) -> Tensor:
        """Embed ids whose first one stands at position ``first``; returns [B, T, E].

        Raises:
            ValueError: longer than there are positions.
        """
        last = first + ids_BT.shape[1]
        if last > len(self.positions):
            raise ValueError(f"{last} tokens, but there are positions for {len(self.positions)}")
        scaled = self.vectors(ids_BT) * math.sqrt(self.vectors.embedding_dim)
        return self.dropout(scaled + self.positions[first:last])
