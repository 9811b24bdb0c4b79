"""From tokens to sentences, and from tokens or sentences to one vector (spec 7.3 and 7.4).

All of it is batched: padded sentences come with a mask, contribute nothing, and a report without a sentence pools to
zeros. Axes: B batch, L text tokens, N image tokens, S sentences, C channels, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class FeatureNorm(nn.Module):
    """Layer normalisation over the last axis without learned scale (biased variance), computed in float32.

    The published code writes ``BatchNorm1d(F, affine=False, track_running_stats=False)`` and feeds ``[1, S, F]``, so
    that the sentences take the place of the channels: every sentence is normalised over its own F features, in
    training and in evaluation alike (spec 7.4, "FN"). This class says what really happens.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., F]`` over F."""
        return functional.layer_norm(x.float(), (self.num_features,), eps=self.eps).to(x.dtype)


def masked_mean(x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Mean over the valid positions of axis 1.

    Args:
        x_BSC: ``[B, S, C]``.
        mask_BS: bool ``[B, S]``, True = valid; None = all valid.

    Returns:
        ``[B, C]``; zeros for a row without a valid position.
    """
    if mask_BS is None:
        return x_BSC.mean(dim=1)
    total = x_BSC.masked_fill(~mask_BS.unsqueeze(-1), 0.0).sum(dim=1)
    return total / mask_BS.sum(dim=1, keepdim=True).clamp(min=1).to(total.dtype)


def zero_empty_rows(x: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Zero the rows of ``x`` ``[B, ...]`` whose mask ``[B, S]`` is False throughout; no mask changes nothing."""
    if mask_BS is None:
        return x
    empty = ~mask_BS.any(dim=1)
    return x.masked_fill(empty.view(-1, *[1] * (x.ndim - 1)), 0.0)


def compact_sentence_index(index_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Renumber the sentences of each row without gaps, keeping their order.

    Args:
        index_BL: int64 ``[B, L]``: 1-based sentence of every token; values below 1 belong to none.

    Returns:
        0-based slots ``[B, L]`` (-1 = none) and the number of sentences ``[B]``.
    """
    inside = index_BL > 0
    same_BLL = index_BL.unsqueeze(2) == index_BL.unsqueeze(1)
    # The slot of a sentence is the number of smaller indices in the row; each index is counted at its first token.
    first_BL = inside & ~same_BLL.tril(-1).any(dim=2)
    smaller_BLL = index_BL.unsqueeze(1) < index_BL.unsqueeze(2)
    slot_BL = (smaller_BLL & first_BL.unsqueeze(1)).sum(dim=2)
    return slot_BL.masked_fill(~inside, -1), first_BL.sum(dim=1)


def sentence_gather(
    tok_BLC: Tensor, sentence_index_BL: Tensor | None, num_sentences: int | None = None
) -> tuple[Tensor, Tensor]:
    """Average the tokens of every sentence (SentenceGather "avg", spec 7.3).

    Args:
        tok_BLC: token features ``[B, L, C]``.
        sentence_index_BL: int64 ``[B, L]``, 1-based sentence of each token, below 1 = none. An index without tokens is
            skipped, so the sentences are packed to the front. None counts all tokens as one sentence.
        num_sentences: pad to this S; None takes the largest number of sentences in the batch (at least 1). Sentences
            beyond S are dropped.

    Returns:
        ``[B, S, C]`` (zeros where there is no sentence) and the bool mask ``[B, S]``.
    """
    if sentence_index_BL is None:
        sentence_index_BL = torch.ones(tok_BLC.shape[:2], dtype=torch.long, device=tok_BLC.device)
    slot_BL, present_B = compact_sentence_index(sentence_index_BL)
    slots = max(int(present_B.max()), 1) if num_sentences is None else num_sentences
    member_BSL = slot_BL.unsqueeze(1) == torch.arange(slots, device=tok_BLC.device).view(1, -1, 1)
    count_BS1 = member_BSL.sum(dim=2, keepdim=True)
    weight_BSL = member_BSL.to(tok_BLC.dtype) / count_BS1.clamp(min=1).to(tok_BLC.dtype)
    return torch.bmm(weight_BSL, tok_BLC), count_BS1.squeeze(2) > 0


class SentenceAttentionPool(nn.Module):
    """Pool a set of rows by self-attention of their mean (spec 7.3, ``SentenceAttentionPool``).

    The mean row is prepended, multi-head scaled dot-product attention runs over the S + 1 rows with separate query,
    key, value and output projections, and the output of the mean row is returned; only that query is computed.

    Args:
        spacial_dim: largest S of the position table; without a table there is no limit.
        embed_dim: channels C.
        num_heads: heads, a divisor of C.
        pos_embed: add a learned table ``[spacial_dim + 1, C]``.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int = 8, pos_embed: bool = False) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.positional_embedding = (
            nn.Parameter(torch.randn(spacial_dim + 1, embed_dim) / embed_dim**0.5) if pos_embed else None
        )
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Pool ``[B, S, C]`` with optional bool mask ``[B, S]`` to ``[B, C]``; an all-masked row gives zeros.

        Raises:
            ValueError: S exceeds the position table.
        """
        rows = torch.cat([masked_mean(x_BSC, mask_BS).unsqueeze(1), x_BSC], dim=1)
        rows = self._add_positions(rows)
        query = self._split(self.q_proj(rows[:, :1]))
        key, value = self._split(self.k_proj(rows)), self._split(self.v_proj(rows))
        # The mean row always stays visible, so no softmax row is empty.
        visible = None if mask_BS is None else functional.pad(mask_BS, (1, 0), value=True)[:, None, None, :]
        pooled = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return zero_empty_rows(self.c_proj(pooled.flatten(1)), mask_BS)

    def pool_scaled_row(self, row_BIC: Tensor, scale_BIT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Pool the T rows ``scale[i, t] * row[i]`` of every i without building them.

        All rows of one i are multiples of the same vector v, hence so are their projections up to the bias: the
        attention needs few dot products per head, such as q(v)·k(v), and the T scales. Equal to `forward` on the built
        rows ``[B * I, T, C]``.

        Args:
            row_BIC: ``[B, I, C]``; without a mask with any leading axes that broadcast with those of the scales, so
                that what many sets of scales share is projected once.
            scale_BIT: ``[B, I, T]``.
            mask_BT: bool ``[B, T]``, True = valid.

        Returns:
            ``[B, I, C]``; zeros for a sample without a valid t.
        """
        mask_B1T = None if mask_BT is None else mask_BT.unsqueeze(1).expand_as(scale_BIT)
        mean_BI1 = _mean_last(scale_BIT, mask_B1T).unsqueeze(-1)
        scale_BI1T = torch.cat([mean_BI1, scale_BIT], dim=-1).unsqueeze(-2)
        query, key = (self._heads(self._unbiased(each, row_BIC)) for each in (self.q_proj, self.k_proj))
        query_bias, key_bias = self._heads(self.q_proj.bias), self._heads(self.k_proj.bias)
        along_BIH = mean_BI1 * (query * key).sum(-1) + (query_bias * key).sum(-1)
        level_BIH = mean_BI1 * (query * key_bias).sum(-1) + (query_bias * key_bias).sum(-1)
        logits = (scale_BI1T * along_BIH.unsqueeze(-1) + level_BIH.unsqueeze(-1)) * query.shape[-1] ** -0.5
        if mask_B1T is not None:
            logits = logits.masked_fill(~functional.pad(mask_B1T, (1, 0), value=True).unsqueeze(2), float("-inf"))
        gate_BIH1 = (logits.softmax(dim=-1) * scale_BI1T).sum(-1, keepdim=True)
        value = (gate_BIH1 * self._heads(self._unbiased(self.v_proj, row_BIC))).flatten(-2) + self.v_proj.bias
        return zero_empty_rows(self.c_proj(value), mask_BT)

    def _add_positions(self, rows: Tensor) -> Tensor:
        if self.positional_embedding is None:
            return rows
        limit = self.positional_embedding.shape[0] - 1
        if rows.shape[1] - 1 > limit:
            raise ValueError(f"{rows.shape[1] - 1} sentences exceed the position table of {limit}: raise spacial_dim")
        return rows + self.positional_embedding[: rows.shape[1]].to(rows.dtype)

    def _split(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, heads, S, C / heads]``."""
        return self._heads(x_BSC).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., heads, C / heads]``."""
        return x.unflatten(-1, (self.num_heads, -1))

    @staticmethod
    def _unbiased(linear: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, linear.weight)


def _mean_last(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid entries of the last axis, zero where there is none."""
    if mask is None:
        return x.mean(dim=-1)
    return x.masked_fill(~mask, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1).to(x.dtype)


class Pooler(nn.Module):
    """``tanh(dense(x[:, 0]))`` (spec 7.4, language poolers)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Pool ``[B, L, C]`` to ``[B, C]``."""
        return torch.tanh(self.dense(x_BLC[:, 0]))


class SwinPooler(nn.Module):
    """Learned weighted sum over the image tokens, dense, tanh (spec 7.4, ``Swin_Pooler``).

    Args:
        num_tokens: image tokens N, fixed by the input size.
        hidden: channels C.
    """

    def __init__(self, num_tokens: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_tokens, 1)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Pool ``[B, N, C]`` to ``[B, C]``.

        Raises:
            ValueError: another number of tokens than the layer was built for.
        """
        if x_BNC.shape[1] != self.fc.in_features:
            raise ValueError(f"{x_BNC.shape[1]} image tokens given, the pooler was built for {self.fc.in_features}")
        return torch.tanh(self.dense(self.fc(x_BNC.transpose(1, 2)).squeeze(-1)))


class SwinAttPooler(nn.Module):
    """Mean over tokens, dense, tanh (spec 7.4, ``Swin_Att_Pooler``).

    ``global_attention`` is part of published checkpoints and is never used.
    """

    def __init__(self, hidden: int, num_heads: int = 8) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.global_attention = SentenceAttentionPool(32, hidden, num_heads)

    def forward(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Pool ``[B, S, C]`` with optional bool mask to ``[B, C]`` (zeros for a row without a valid position)."""
        return zero_empty_rows(torch.tanh(self.dense(masked_mean(x_BSC, mask_BS))), mask_BS)


class SentencePooler(nn.Module):
    """Narrow feature of every sentence: Linear, `FeatureNorm`, GELU, Linear, tanh (spec 7.4, ``Sentence_Pooler``).

    Args:
        hidden: channels C.
        middle: width of the normalised layer.
        out: width F of the result.
    """

    def __init__(self, hidden: int, middle: int = 384, out: int = 128) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(hidden, middle), FeatureNorm(middle), nn.GELU(), nn.Linear(middle, out))

    def forward(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Map ``[B, S, C]`` to ``[B, S, F]``; rows that the bool mask ``[B, S]`` excludes are zero."""
        features = torch.tanh(self.dense(x_BSC))
        return features if mask_BS is None else features.masked_fill(~mask_BS.unsqueeze(-1), 0.0)
