"""Small packed files for the tests of the data path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mg3d.datasets.arrow_schema import make_row_batch, make_schema
from mg3d.datasets.report_text import split_fragments, wordpiece_tokenizer_from_vocab

SHAPE_DHW = (8, 6, 10)
GEOMETRY = {
    "crop_fractions": [1, 1, 1],
    "size": list(SHAPE_DHW),
    "target_spacing_mm": [1.5, 0.75, 0.75],
    "store": "crop",
}
WORDS = ["the", "lungs", "are", "clear", "no", "nodule", "effusion", "seen", "heart", "size", "is", "normal", "mass"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", ";", "##s", "##es", *WORDS]


def tokenizer() -> Any:
    return wordpiece_tokenizer_from_vocab(VOCAB)


def volume(number: int, shape: Sequence[int] = SHAPE_DHW, dtype: str = "int16") -> np.ndarray:
    rng = np.random.default_rng(number)
    low, high = (0, 256) if dtype == "uint8" else (-1200, 1200)
    return rng.integers(low, high, size=tuple(shape)).astype(dtype)


def report(number: int) -> tuple[str, str]:
    first = "The lungs are clear, no nodule" if number % 2 else "No effusion is seen, heart size is normal"
    return f"{first}. The heart is {WORDS[number % len(WORDS)]}.", f"{WORDS[number % 7]} normal."


def row_batch(
    schema: pa.Schema, number: int, *, corpus: str = "clm_ct_rate", split: str = "train", **changes: Any
) -> Any:
    findings, impression = report(number)
    values: dict[str, Any] = {
        "image": volume(number),
        "image_id": f"scan_{number}",
        "patient_id": f"patient_{number // 2}",
        "corpus": corpus,
        "split": split,
        "findings": findings,
        "impression": impression,
        "spacing_mm": (1.5, 0.75, 0.75),
        "labels": [number % 2] * 18,
    }
    values |= changes
    values.setdefault("findings_sen", split_fragments(values["findings"]))
    values.setdefault("impression_sen", split_fragments(values["impression"]))
    return make_row_batch(schema, **values)


def write_arrow(
    path: Path,
    count: int,
    *,
    first: int = 0,
    schema: pa.Schema | None = None,
    compression: str | None = None,
    **changes: Any,
) -> Path:
    schema = schema or make_schema(geometry=GEOMETRY)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for number in range(first, first + count):
            writer.write_batch(row_batch(schema, number, **changes))
    return path


def write_corpus(root: Path, corpus: str, counts: dict[str, int]) -> None:
    for split, count in counts.items():
        write_arrow(root / f"{corpus}_{split}.arrow", count, corpus=corpus, split=split)
