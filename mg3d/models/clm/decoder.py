"""A causal decoder that starts as the text encoder: its layers copied, cross-attention to the image new.

The published decoder class (BertGeneration) has word and position embeddings only and counts positions from 0. What a
BERT or RoBERTa encoder adds to that, the embedding of token type 0 and RoBERTa's offset of the positions, goes into the
position table, so that the embedding layer of the decoder gives exactly what that of the encoder gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.errors import ConfigError
from mg3d.models.language_encoders import BertTextEncoder

__all__ = ["Initialisation", "SpecialTokens", "build_decoder", "copy_text_encoder"]

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
)
_TABLES = ("word_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that begin, end and pad a report, and the further ones that a report never holds.

    BERT begins with ``[CLS]`` and ends with ``[SEP]``, RoBERTa with ``<s>`` and ``</s>``.
    """

    start: int
    end: int
    pad: int
    never: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Read them from a tokenizer.

        Raises:
            ConfigError: it has no token to begin, to end, or to pad with.
        """
        names = {"start": "cls_token_id", "end": "sep_token_id", "pad": "pad_token_id"}
        ids = {ours: getattr(tokenizer, theirs, None) for ours, theirs in names.items()}
        for name, found in ids.items():
            if found is None:
                raise ConfigError(
                    f"the tokenizer has no {names[name].removesuffix('_id')}: reports need one to {name} with",
                    "name a BERT or RoBERTa model as the tokenizer",
                )
        start, end, pad = (int(found) for found in ids.values() if found is not None)
        return cls(start, end, pad, tuple(sorted({int(each) for each in tokenizer.all_special_ids} - {end})))


@dataclass(frozen=True)
class Initialisation:
    """Where the values of a decoder come from.

    Attributes:
        copied: parameters taken from the text encoder.
        new: parameters that start at random (cross-attention) or zero (bias over the words).
    """

    copied: tuple[str, ...]
    new: tuple[str, ...]


def build_decoder(text: BertTextEncoder, tokens: SpecialTokens) -> Any:
    """A causal language model with cross-attention of the sizes of a text encoder, randomly initialised.

    Args:
        text: the encoder; its configuration gives sizes and dropout.
        tokens: ids that begin, end and pad.

    Returns:
        transformers' ``BertGenerationDecoder``; output words share the weights of the input words.
    """
    from transformers import BertGenerationConfig, BertGenerationDecoder

    sizes = {name: getattr(text.config, name) for name in _SIZES}
    config = BertGenerationConfig(
        **sizes,
        max_position_embeddings=text.max_length,
        pad_token_id=tokens.pad,
        bos_token_id=tokens.start,
        eos_token_id=tokens.end,
        is_decoder=True,
        add_cross_attention=True,
        tie_word_embeddings=True,
    )
    return BertGenerationDecoder(config)


@torch.no_grad()
def copy_text_encoder(decoder: nn.Module, text: BertTextEncoder) -> Initialisation:
    """Copy self-attention, feed-forward layers and embeddings of the encoder into the decoder, value by value.

    Args:
        decoder: of `build_decoder`, changed in place.
        text: the encoder.

    Returns:
        Names of the decoder's parameters by origin.
    """
    target = dict(decoder.named_parameters())
    values = _decoder_values(text)
    for name, value in values.items():
        target[name].copy_(value)
    return Initialisation(tuple(values), tuple(name for name in target if name not in values))


def _decoder_values(text: BertTextEncoder) -> Mapping[str, Tensor]:
    """Decoder parameter -> value of the text encoder."""
    tables = text.embeddings.state_dict()
    first = int(text.config.max_position_embeddings) - text.max_length  # RoBERTa counts from pad + 1
    positions = tables["position_embeddings.weight"][first:] + tables["token_type_embeddings.weight"][0]
    embeddings = {name: tables[name] for name in _TABLES} | {"position_embeddings.weight": positions}
    return {
        **{f"bert.embeddings.{name}": value for name, value in embeddings.items()},
        **{f"bert.encoder.{name}": value for name, value in text.encoder.state_dict().items()},
    }
