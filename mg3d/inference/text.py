"""Texts to token ids as the evaluation gives them to the network.

B texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mg3d.errors import DataError


def tokenize_prompts(
    tokenizer: Any, texts: Sequence[str], max_length: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Tokenise texts that are each taken as one sentence.

    Args:
        tokenizer: a transformers tokenizer.
        texts: prompts, at least one, none empty.
        max_length: tokens kept, [CLS] and [SEP] included.
        device: of the result.

    Returns:
        Ids and mask, int64 [B, L].

    Raises:
        DataError: no text, an empty one, or something that is no text.
    """
    if isinstance(texts, str) or not texts:
        raise DataError("expected a list of texts", 'write ["one prompt"]')
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"text {number} is empty or no text: {text!r}", "give words")
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
