"""BERT-like text encoder, used in two parts: the embedding layer and the transformer layers.

Shape suffixes: B batch, L text tokens, E encoder width.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from mg3d.errors import ConfigError
from mg3d.models.language_encoders.checks import OFFSET_POSITIONS

MASKED_OUT = -10000.0
"""Additive attention bias of masked tokens (spec pretraining 7.1); finite, so a fully masked row stays finite."""


class BertTextEncoder(nn.Module):
    """Holds ``embeddings``, ``encoder`` and ``pooler`` of a BERT or RoBERTa model under their published names.

    Args:
        model: a transformers model with these three parts and a ``config``.
        frozen: switch gradients of all parameters off, once.
        eval_mode: keep a frozen encoder in eval mode (no dropout) even while the rest trains.

    Raises:
        ConfigError: the model has no such parts.
    """

    def __init__(self, model: nn.Module, *, frozen: bool = True, eval_mode: bool = True) -> None:
        super().__init__()
        parts = {name: getattr(model, name, None) for name in ("embeddings", "encoder")}
        lacking = [name for name, part in parts.items() if not isinstance(part, nn.Module)]
        if lacking:
            raise ConfigError(
                f"the text encoder {type(model).__name__} has no {' and no '.join(lacking)}",
                "name a BERT or RoBERTa model as the tokenizer",
            )
        self.embeddings: nn.Module = model.embeddings  # type: ignore[assignment]
        self.encoder: nn.Module = model.encoder  # type: ignore[assignment]
        self.pooler: nn.Module | None = getattr(model, "pooler", None)
        self.config: Any = model.config
        self.frozen, self.eval_mode = frozen, eval_mode
        if frozen:
            self.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_drop_position_ids)
        self.train(self.training)

    @property
    def embed_dim(self) -> int:
        """Width E of the embeddings."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the word embedding table."""
        return int(self.config.vocab_size)

    @property
    def max_length(self) -> int:
        """Largest number of tokens the position table allows."""
        reserved = int(self.config.pad_token_id or 0) + 1 if self.config.model_type in OFFSET_POSITIONS else 0
        return int(self.config.max_position_embeddings) - reserved

    def plain_config(self) -> dict[str, Any]:
        """Architecture in plain JSON types, without the place it was read from: enough to rebuild the encoder."""
        found = json.loads(self.config.to_json_string(use_diff=False))
        return {key: value for key, value in found.items() if not key.startswith("_") and value is not None}

    def train(self, mode: bool = True) -> BertTextEncoder:
        """Set training mode; a frozen encoder with ``eval_mode`` stays in eval mode."""
        super().train(mode and not (self.frozen and self.eval_mode))
        return self

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Embed token ids: word + position + type 0, LayerNorm -> ``[B, L, E]``."""
        return self.embeddings(input_ids=ids_BL)

    def contextualize(self, emb_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """Run the transformer layers.

        Args:
            emb_BLE: output of :meth:`embed`.
            mask_BL: 1 for tokens to attend to, 0 for padding.

        Returns:
            Hidden states ``[B, L, E]``.
        """
        bias_B11L = (1.0 - mask_BL[:, None, None, :].to(emb_BLE.dtype)) * MASKED_OUT
        # attention kernels want the bias in the dtype that autocast gives the queries
        if torch.is_autocast_enabled(emb_BLE.device.type):
            bias_B11L = bias_B11L.to(torch.get_autocast_dtype(emb_BLE.device.type))
        output = self.encoder(emb_BLE, attention_mask=bias_B11L)
        return output[0] if isinstance(output, tuple) else output.last_hidden_state

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Embed and contextualise token ids -> ``[B, L, E]``."""
        return self.contextualize(self.embed(ids_BL), mask_BL)


def _drop_position_ids(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let states that store constant index buffers (transformers 4) load strictly."""
    for name in ("position_ids", "token_type_ids"):
        state.pop(f"{prefix}embeddings.{name}", None)
