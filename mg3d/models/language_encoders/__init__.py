"""Text encoders: BERT-like models by hub id or local directory."""

from __future__ import annotations

from mg3d.models.language_encoders.bert import BertTextEncoder
from mg3d.models.language_encoders.registry import create_text_encoder, create_tokenizer, encoder_revision

__all__ = ["BertTextEncoder", "create_text_encoder", "create_tokenizer", "encoder_revision"]
