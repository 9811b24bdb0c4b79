"""A small random BERT with a WordPiece vocabulary of the phantom reports, as a directory transformers can load.

Written without torch: the weights are drawn with numpy and stored as safetensors, so making it takes a moment.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mg3d.datasets.labels import CT_RATE_LABELS

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
HIDDEN_SIZE = 96
LAYERS = 2
HEADS = 4
MAX_TOKENS = 192
INIT_STD = 0.05
_PUNCTUATION = ".,;:!?()[]{}'\"/\\-+*%&<>=_#@"
_PROMPT_WORDS = tuple("no not is are there present absent of evidence the a with without".split())


def build_vocabulary(texts: Iterable[str]) -> list[str]:
    """WordPiece vocabulary: special tokens, every character alone and as a continuation, then words by frequency.

    Args:
        texts: reports; upper case is ignored.

    Returns:
        Distinct tokens; any ASCII text can be written with them.
    """
    counts: Counter[str] = Counter(_PROMPT_WORDS)
    for text in (*texts, *CT_RATE_LABELS):
        counts.update(re.findall(r"[a-z]+|[0-9]", text.lower()))
    characters = string.ascii_lowercase + string.digits
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return [*SPECIAL_TOKENS, *_PUNCTUATION, *characters, *(f"##{c}" for c in characters), *words]


def write_text_encoder(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Write ``config.json``, vocabulary, tokenizer settings and random weights.

    Args:
        folder: target, made if absent.
        texts: reports the vocabulary is taken from.
        seed: seed of the weights.
    """
    vocabulary = build_vocabulary(texts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": MAX_TOKENS}
    _write_json(folder / "tokenizer_config.json", tokenizer)
    _write_json(folder / "config.json", _model_config(len(vocabulary)))
    weights = _weights(len(vocabulary), np.random.default_rng((seed, 21)))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _model_config(vocab_size: int) -> dict[str, object]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * HIDDEN_SIZE,
        "max_position_embeddings": MAX_TOKENS,
        "type_vocab_size": 2,
        "initializer_range": INIT_STD,
        "pad_token_id": 0,
    }


def _weights(vocab_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, wide = HIDDEN_SIZE, 4 * HIDDEN_SIZE
    tables = {"word": vocab_size, "position": MAX_TOKENS, "token_type": 2}
    weights = {f"embeddings.{name}_embeddings.weight": _normal(rng, rows, hidden) for name, rows in tables.items()}
    weights |= _norm("embeddings.LayerNorm")
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            weights |= _linear(rng, f"{layer}.attention.{name}", hidden, hidden)
        weights |= _linear(rng, f"{layer}.intermediate.dense", wide, hidden)
        weights |= _linear(rng, f"{layer}.output.dense", hidden, wide)
        weights |= _norm(f"{layer}.attention.output.LayerNorm") | _norm(f"{layer}.output.LayerNorm")
    return weights | _linear(rng, "pooler.dense", hidden, hidden)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return INIT_STD * rng.standard_normal(shape, dtype=np.float32)


def _linear(rng: np.random.Generator, name: str, rows: int, columns: int) -> dict[str, np.ndarray]:
    return {f"{name}.weight": _normal(rng, rows, columns), f"{name}.bias": np.zeros(rows, dtype=np.float32)}


def _norm(name: str) -> dict[str, np.ndarray]:
    ones, zeros = np.ones(HIDDEN_SIZE, dtype=np.float32), np.zeros(HIDDEN_SIZE, dtype=np.float32)
    return {f"{name}.weight": ones, f"{name}.bias": zeros}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
