"""A complete job of seconds: two packed corpora of random volumes and a small text encoder, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import BertConfig

from mg3d.datasets.arrow_schema import make_row_batch, make_schema
from mg3d.datasets.report_text import split_fragments, wordpiece_tokenizer_from_vocab

WORDS = ("the", "lungs", "are", "clear", "no", "nodule", "effusion", "seen", "heart", "size", "is", "normal")
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", "##s", *WORDS]
SIZE_DHW = (16, 12, 16)


def make_job(folder: Path, rows: int = 8) -> list[str]:
    """Write arrows and a text encoder under ``folder`` and return the words that name them to main.py."""
    for corpus in ("clm_ct_rate", "clm_chest_ctrg"):
        for split, count in (("train", rows), ("val", 2), ("test", 2)):
            _write_arrow(folder / "arrows" / f"{corpus}_{split}.arrow", corpus, split, count)
    encoder = folder / "text encoder"
    wordpiece_tokenizer_from_vocab(VOCAB).save_pretrained(encoder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=len(VOCAB), max_position_embeddings=64, **sizes).save_pretrained(encoder)
    return [f"data_root={folder / 'arrows'}", f"tokenizer={encoder}", "text_encoder_random_init=True"]


def _write_arrow(path: Path, corpus: str, split: str, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    geometry = {"crop_fractions": [1, 1, 1], "size": list(SIZE_DHW), "target_spacing_mm": [1.5, 0.75, 0.75]}
    schema = make_schema(geometry=geometry | {"store": "crop"})
    rng = np.random.default_rng(len(corpus) + len(split))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in range(count):
            findings = f"The lungs are clear, no {WORDS[row % 12]}. Heart {WORDS[(row + 3) % 12]} is normal."
            writer.write_batch(
                make_row_batch(
                    schema,
                    image=rng.integers(-1000, 1000, size=SIZE_DHW).astype("int16"),
                    image_id=f"{corpus}_{split}_{row}",
                    patient_id=f"{split}_{row}",
                    corpus=corpus,
                    split=split,
                    findings=findings,
                    impression="Normal size.",
                    findings_sen=split_fragments(findings),
                    impression_sen=["Normal size."],
                    spacing_mm=(1.5, 0.75, 0.75),
                    labels=[row % 2] * 18,
                )
            )
