"""Whole-word masking: the algorithm of transformers 4.11, written anew (spec pretraining 3.4).

B batch, L text tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import torch

IGNORED: Final = -100
MAX_PREDICTIONS: Final = 512
MASK_PROBABILITY: Final = 0.8
RANDOM_PROBABILITY: Final = 0.5  # of what is not replaced by [MASK]
Budget = Literal["padded_reference", "real"]


class WholeWordMasker:
    """Chooses whole words and replaces their tokens.

    Args:
        tokenizer: a transformers fast WordPiece tokenizer.
        mlm_probability: part of the tokens to choose.
        budget: ``padded_reference`` counts padding too (published; about 15 % of the real tokens remain on average),
            ``real`` counts and chooses real tokens only.
        whole_words: False treats every token as a word of its own.

    Raises:
        ValueError: unknown budget or a probability outside (0, 1).
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm_probability: float = 0.15,
        budget: Budget = "padded_reference",
        *,
        whole_words: bool = True,
    ) -> None:
        if budget not in ("padded_reference", "real"):
            raise ValueError(f"wwm_budget must be 'padded_reference' or 'real', got {budget!r}")
        if not 0.0 < mlm_probability < 1.0:
            raise ValueError(f"mlm_prob must be in (0, 1), got {mlm_probability}")
        self.mlm_probability = mlm_probability
        self.budget = budget
        self.vocab_size = len(tokenizer)
        self.mask_id = int(tokenizer.mask_token_id)
        self._ends = frozenset((int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)))
        self._special = np.zeros(self.vocab_size, dtype=bool)
        self._special[list(tokenizer.all_special_ids)] = True
        self._continuation = np.zeros(self.vocab_size, dtype=bool)
        if whole_words:
            self._continuation[[i for token, i in tokenizer.get_vocab().items() if token.startswith("##")]] = True

    def choose(self, ids_L: Sequence[int] | np.ndarray, rng: random.Random) -> np.ndarray:
        """Return the chosen positions as bool ``[L]``, before special tokens and padding are cleared.

        Args:
            ids_L: token ids of one sequence.
            rng: shuffles the candidates; ``random.Random(s)`` gives the published choice after ``random.seed(s)``.
        """
        ids = np.asarray(ids_L)
        eligible = ~self._special[ids] if self.budget == "real" else ~np.isin(ids, list(self._ends))
        words: list[list[int]] = []
        for position in np.flatnonzero(eligible).tolist():
            if words and self._continuation[ids[position]]:
                words[-1].append(position)
            else:
                words.append([position])
        rng.shuffle(words)
        counted = int(eligible.sum()) if self.budget == "real" else len(ids)
        limit = min(MAX_PREDICTIONS, max(1, round(counted * self.mlm_probability)))
        chosen = np.zeros(len(ids), dtype=bool)
        taken = 0
        for word in words:
            if taken >= limit:
                break
            if taken + len(word) <= limit:
                chosen[word] = True
                taken += len(word)
        return chosen

    def mask(
        self, ids_BL: torch.Tensor, rng: random.Random, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (masked ids, labels), int64 ``[B, L]`` each; labels are -100 where nothing is to be predicted.

        Args:
            ids_BL: token ids.
            rng: used by :meth:`choose`, sequence after sequence.
            generator: three draws of the shape ``[B, L]``: keep or mask, random or unchanged, random ids. With
                ``torch.Generator().manual_seed(s)`` the numbers are those of ``torch.manual_seed(s)``.
        """
        chosen = torch.from_numpy(np.stack([self.choose(ids_L, rng) for ids_L in ids_BL.numpy()]))
        chosen &= ~torch.from_numpy(self._special)[ids_BL]
        labels = torch.where(chosen, ids_BL, IGNORED)
        shape = ids_BL.shape
        replaced = torch.bernoulli(torch.full(shape, MASK_PROBABILITY), generator=generator).bool() & chosen
        randomised = torch.bernoulli(torch.full(shape, RANDOM_PROBABILITY), generator=generator).bool()
        random_ids = torch.randint(self.vocab_size, shape, dtype=torch.long, generator=generator)
        masked = torch.where(replaced, self.mask_id, ids_BL)
        return torch.where(randomised & chosen & ~replaced, random_ids, masked), labels

    def mask_sample(self, ids_L: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (masked ids, labels), int64 ``[L]`` each, as a function of the ids and the seed alone."""
        masked, labels = self.mask(ids_L[None], random.Random(seed), torch.Generator().manual_seed(seed))
        return masked[0], labels[0]
