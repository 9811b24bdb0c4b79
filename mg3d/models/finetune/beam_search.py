"""Beam search over a batch of images at once: length control, trigram blocking, one decoder step for all beams.

Shape suffixes: B images, K beams of an image, N = B * K rows (beam-minor), T tokens so far, V words (ids 0..V).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

END = 0
"""Id that starts and ends a report."""
IMPOSSIBLE = float("-inf")


class StepDecoder(Protocol):
    """A language model that goes on writing N rows, K of each image."""

    def step(self, ids_NT: Tensor) -> Tensor:
        """Log-probabilities [N, V + 1] of the next token, given all tokens so far (the start included)."""
        ...

    def reorder(self, rows_N: Tensor) -> None:
        """Continue row k with the past of row ``rows_N[k]`` of the same image."""
        ...


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        beams: hypotheses kept for each image; 1 is greedy search.
        max_words: longest report in words.
        min_words: shortest report; the end is not allowed earlier.
        length_penalty: scores are divided by ``length ** length_penalty`` (0: sums of log-probabilities as published).
        block_trigrams: no three words occur twice in a report.

    Raises:
        ValueError: a value out of range.
    """

    beams: int = 3
    max_words: int = 150
    min_words: int = 0
    length_penalty: float = 0.0
    block_trigrams: bool = False

    def __post_init__(self) -> None:
        if self.beams < 1 or self.max_words < 1 or not 0 <= self.min_words <= self.max_words:
            raise ValueError(f"beams and max_words are at least 1, min_words is at most max_words, got {self}")
        if self.length_penalty < 0:
            raise ValueError(f"length_penalty={self.length_penalty} must not be negative")


@dataclass(frozen=True)
class Hypotheses:
    """The best report of every image.

    Attributes:
        ids: [B, T] words, padded with 0; no start.
        scores: [B] sum of log-probabilities, over ``length ** length_penalty``; the length counts the end.
    """

    ids: Tensor
    scores: Tensor


def better_of(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    """Take the higher score for each image; the first one wins a tie."""
    width = max(first.ids.shape[1], second.ids.shape[1])
    padded = [torch.nn.functional.pad(each.ids, (0, width - each.ids.shape[1])) for each in (first, second)]
    take = second.scores > first.scores
    return Hypotheses(torch.where(take[:, None], padded[1], padded[0]), torch.where(take, second.scores, first.scores))


@torch.no_grad()
def beam_search(decoder: StepDecoder, images: int, options: SearchOptions, device: torch.device) -> Hypotheses:
    """Search the best report of every image.

    A hypothesis that ends is set aside and its beam stays empty for that step, as in the published search. A search
    ends when no open beam of any image can still win.

    Args:
        decoder: ready for ``images * options.beams`` rows.
        images: B.
        options: how to search.
        device: of the decoder's tensors.

    Returns:
        the hypothesis with the highest score for each image; among equals the one that ended first.
    """
    beams = options.beams
    scores_BK = torch.full((images, beams), IMPOSSIBLE, device=device)
    scores_BK[:, 0] = 0.0  # all beams start alike: only one of them may branch
    ids_NT = torch.full((images * beams, 1), END, dtype=torch.long, device=device)
    best = _Best(images, options, device)
    first_row_B1 = torch.arange(images, device=device)[:, None] * beams
    for length in range(1, options.max_words + 2):
        logp_NV = _allowed(decoder.step(ids_NT).float(), ids_NT, options)
        total_BKV = scores_BK[:, :, None] + logp_NV.view(images, beams, -1)
        choices = logp_NV.shape[1]
        scores_BK, place_BK = total_BKV.flatten(1).topk(beams, dim=1)
        rows_N = (first_row_B1 + place_BK // choices).flatten()
        ids_NT = torch.cat([ids_NT[rows_N], (place_BK % choices).view(-1, 1)], dim=1)
        ended_BK = (place_BK % choices == END) & scores_BK.isfinite()
        best.offer(ids_NT.view(images, beams, -1), scores_BK.masked_fill(~ended_BK, IMPOSSIBLE), length)
        scores_BK = scores_BK.masked_fill(ended_BK, IMPOSSIBLE)
        if best.settled(scores_BK):
            break
        decoder.reorder(rows_N)
    return best.result()


def _allowed(logp_NV: Tensor, ids_NT: Tensor, options: SearchOptions) -> Tensor:
    """Forbid an early end, a late word and, where asked for, a trigram for the second time."""
    words = ids_NT.shape[1] - 1
    if words >= options.max_words:
        only_end_NV = torch.full_like(logp_NV, IMPOSSIBLE)
        only_end_NV[:, END] = 0.0  # cut off: the report ends here at no cost, as published
        return only_end_NV
    end_N = logp_NV[:, END].clone()
    if options.block_trigrams and words >= 3:
        logp_NV = logp_NV.masked_fill(_repeats(ids_NT, logp_NV.shape[1]), IMPOSSIBLE)
    if words < options.min_words:
        logp_NV = logp_NV.clone()
        logp_NV[:, END] = IMPOSSIBLE
    stuck_N = ~logp_NV.isfinite().any(dim=1)
    if stuck_N.any():  # every word is blocked: ending is the only way on
        logp_NV[:, END] = torch.where(stuck_N, end_N, logp_NV[:, END])
    return logp_NV


def _repeats(ids_NT: Tensor, choices: int) -> Tensor:
    """Words [N, choices] that would complete a trigram which the row has already; the end is never one of them."""
    words_NT = ids_NT[:, 1:]
    same_NT = (words_NT[:, :-2] == words_NT[:, -2, None]) & (words_NT[:, 1:-1] == words_NT[:, -1, None])
    count_NV = torch.zeros(len(ids_NT), choices, device=ids_NT.device)
    return count_NV.scatter_add_(1, words_NT[:, 2:], same_NT.float()) > 0


class _Best:
    """The best finished hypothesis of every image so far."""

    def __init__(self, images: int, options: SearchOptions, device: torch.device) -> None:
        self.options = options
        self.scores_B = torch.full((images,), IMPOSSIBLE, device=device)
        self.ids_BT = torch.zeros(images, options.max_words + 1, dtype=torch.long, device=device)

    def offer(self, ids_BKT: Tensor, scores_BK: Tensor, length: int) -> None:
        """Keep what beats the best so far; ``length`` is the number of tokens, the end included."""
        score_B, beam_B = (scores_BK / length**self.options.length_penalty).max(dim=1)
        wins_B = score_B > self.scores_B
        chosen_BT = ids_BKT[torch.arange(len(beam_B), device=beam_B.device), beam_B][:, 1:]
        width = chosen_BT.shape[1]
        self.scores_B = torch.where(wins_B, score_B, self.scores_B)
        self.ids_BT[:, :width] = torch.where(wins_B[:, None], chosen_BT, self.ids_BT[:, :width])

    def settled(self, open_BK: Tensor) -> bool:
        """Whether no open hypothesis can still win: going on never raises a sum of log-probabilities."""
        longest = (self.options.max_words + 1) ** self.options.length_penalty
        return bool((open_BK.amax(dim=1) / longest <= self.scores_B).all())

    def result(self) -> Hypotheses:
        """All images, cut to the longest report."""
        used = int((self.ids_BT != END).any(dim=0).sum())
        return Hypotheses(self.ids_BT[:, : max(used, 1)], self.scores_B)
