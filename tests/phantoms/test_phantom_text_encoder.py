"""The small BERT made from phantom reports loads, is seeded, and knows the words."""

from __future__ import annotations

from pathlib import Path

import torch

from mg3d.models.language_encoders.registry import create_text_encoder, create_tokenizer
from mg3d.phantoms.text_encoder import HIDDEN_SIZE, build_vocabulary, write_text_encoder

TEXTS = ["There is no pleural effusion. A lung nodule of 12 mm is seen.", "Cardiomegaly is present."]


def test_vocabulary_is_distinct_and_starts_with_the_special_tokens() -> None:
    vocabulary = build_vocabulary(TEXTS)
    assert len(set(vocabulary)) == len(vocabulary)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {"pleural", "cardiomegaly", "##x", "."} <= set(vocabulary)


def test_model_and_tokenizer_load_and_repeat(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_text_encoder(tmp_path / name, TEXTS, seed)
    tokenizer = create_tokenizer(str(tmp_path / "one"))
    encoding = tokenizer("There is no Xylograph-7 effusion.", return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"][0])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "[UNK]" not in tokens
    assert tokens[1:4] == ["there", "is", "no"] and "effusion" in tokens
    encoders = [create_text_encoder(str(tmp_path / name)) for name in ("one", "two", "three")]
    outputs = [e.contextualize(e.embed(encoding["input_ids"]), encoding["attention_mask"]) for e in encoders]
    assert outputs[0].shape == (1, len(tokens), HIDDEN_SIZE)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.allclose(outputs[0], outputs[2])
