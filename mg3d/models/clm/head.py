"""The report head: image tokens become the decoder's visual memory; words are learned shifted by one, and generated.

Shape suffixes: B studies, N image tokens, C fusion width, E decoder width, L ids of a report, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.errors import ConfigError
from mg3d.models.clm.decoder import Initialisation, SpecialTokens, build_decoder, copy_text_encoder
from mg3d.models.finetune.report_losses import word_loss
from mg3d.models.language_encoders import BertTextEncoder
from mg3d.models.network import published_init

__all__ = ["CausalReportHead", "GenerationOptions"]

LEAST_SPREAD = 1e-6
SAMPLED_FROM = 50
"""A sampled word is one of the 50 most likely (the library's default)."""


@dataclass(frozen=True)
class GenerationOptions:
    """How reports are generated.

    Attributes:
        longest: ids of a report at most, start and end included.
        beams: hypotheses of the beam search; 1 is greedy.
        sample: draw every word (one report, no beams) instead of searching.
        cache: keep keys and values of earlier words.
    """

    longest: int
    beams: int = 1
    sample: bool = False
    cache: bool = True


class CausalReportHead(nn.Module):
    """Projection of the image tokens (Linear, LayerNorm) and the decoder.

    Args:
        text: text encoder that gives the decoder its sizes and first values.
        tokens: ids that begin, end and pad a report.
        width: C, width of the projected image tokens.
        seen: N image tokens of a volume, and the width they have in the image encoder.

    Attributes:
        initialisation: which parameters of the decoder were copied.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, text: BertTextEncoder, tokens: SpecialTokens, width: int, seen: tuple[int, int]) -> None:
        super().__init__()
        self.tokens = tokens
        self.register_buffer("centre", torch.zeros(seen))
        self.register_buffer("spread", torch.ones(seen))
        self.proj = nn.Sequential(nn.Linear(width, text.embed_dim), nn.LayerNorm(text.embed_dim))
        self.proj.apply(published_init)
        self.decoder: Any = build_decoder(text, tokens)
        self.initialisation: Initialisation = self.copy_from(text)

    def copy_from(self, text: BertTextEncoder) -> Initialisation:
        """Take the values of a text encoder of the same sizes."""
        self.initialisation = copy_text_encoder(self.decoder, text)
        return self.initialisation

    @property
    def longest(self) -> int:
        """Ids that the position table allows."""
        return int(self.decoder.config.max_position_embeddings)

    def check_length(self, key: str, length: int) -> None:
        """Refuse reports longer than the position table.

        Raises:
            ConfigError: naming the key and the limit.
        """
        if length > self.longest:
            raise ConfigError(
                f"{key}={length} exceeds the text model's {self.longest} positions", f"write {key}={self.longest}"
            )

    @property
    def is_standardised(self) -> bool:
        """Whether the mean and spread of the image tokens were taken."""
        return bool(self.centre.any())

    def standardise(self, tokens_nNF: Tensor) -> None:
        """Take mean and spread of each encoder token over n volumes: what differs between volumes then leads.

        Without it (mean 0, spread 1) tokens are projected as they are, as published; what all volumes share is then
        most of them.
        """
        self.centre.copy_(tokens_nNF.mean(0))
        self.spread.copy_(tokens_nNF.std(0).clamp(min=LEAST_SPREAD))

    def standard(self, tokens_BNF: Tensor) -> Tensor:
        """Encoder tokens less their mean, over their spread."""
        return (tokens_BNF - self.centre) / self.spread

    def memory(self, image_BNC: Tensor) -> Tensor:
        """Image tokens [B, N, C] -> what the decoder attends to [B, N, E]."""
        return self.proj(image_BNC)

    def logits(self, image_BNC: Tensor, ids_BL: Tensor) -> Tensor:
        """Scores of the next word at every position [B, L, V]; a position sees itself and earlier ones."""
        memory = self.memory(image_BNC)
        return self.decoder(input_ids=ids_BL, encoder_hidden_states=memory, use_cache=False).logits

    def loss(self, image_BNC: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Mean negative log-likelihood of every id after the first; padding does not count.

        Args:
            image_BNC: projected image tokens.
            ids_BL: start, words, end, padding.
            mask_BL: 1 where an id belongs to the report.
        """
        return word_loss(self.logits(image_BNC, ids_BL[:, :-1]).float(), ids_BL[:, 1:], mask_BL[:, 1:])

    @torch.no_grad()
    def generate(self, image_BNC: Tensor, options: GenerationOptions) -> Tensor:
        """Write reports.

        Args:
            image_BNC: projected image tokens, B at least 1.
            options: beams or sampling, length.

        Returns:
            Ids [B, L] that begin with the start and end with the end or padding.
        """
        from transformers import GenerationConfig
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        memory = self.memory(image_BNC)
        start = torch.full((len(memory), 1), self.tokens.start, device=memory.device)
        settings = GenerationConfig(
            num_beams=1 if options.sample else options.beams,
            do_sample=options.sample,
            top_k=SAMPLED_FROM if options.sample else None,
            max_length=min(options.longest, self.longest),
            bos_token_id=self.tokens.start,
            eos_token_id=self.tokens.end,
            pad_token_id=self.tokens.pad,
            suppress_tokens=list(self.tokens.never),
            use_cache=options.cache,
        )
        config = self.decoder.config
        # the library gives decoders without an encoder of their own a cache that has no place for the cross-attention
        kept = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)) if options.cache else None
        return self.decoder.generate(
            start,
            attention_mask=torch.ones_like(start),
            generation_config=settings,
            encoder_hidden_states=memory,
            **({"past_key_values": kept} if kept is not None else {}),
        )
