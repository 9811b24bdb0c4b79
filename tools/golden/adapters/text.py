"""Report text: splitting, sentence index, collation and whole-word masking."""

from __future__ import annotations

import random
from typing import Any

import pandas as pd
import pyarrow as pa

from mg3d.datasets.arrow_schema import check_schema
from mg3d.datasets.collate import collate_reports, mask_reference, pad_stack
from mg3d.datasets.report_text import (
    encode_report,
    prepare_sections,
    split_fragments,
    wordpiece_tokenizer_from_vocab,
)
from mg3d.datasets.sentence_splitter import split_into_sentences
from mg3d.datasets.whole_word_mask import WholeWordMasker
from prepro.splits import positional_split
from tools.golden.bundle import Bundle
from tools.golden.index import Entry

SEPARATOR = {"none": "none_reference"}


def _published_row(report: dict[str, str]) -> dict[str, list[str]]:
    sections = prepare_sections(report["report"], report["result"])
    return {
        "texts": [sections.caption],
        "findings": [sections.findings],
        "findings_sen": list(sections.findings_sen),
        "impression": [sections.impression],
        "impression_sen": list(sections.impression_sen),
    }


def _written_schema(rows: list[dict[str, list[str]]]) -> pa.Schema:
    """Schema of a table written from rows as the published builder does, accepted by our reader."""
    table = pd.DataFrame(
        {
            "image": [b""],
            "caption": row["texts"],
            "image_id": "case",
            **{name: row[name] for name in ("findings", "impression", "findings_sen", "impression_sen")},
            "split": "train",
        }
        for row in rows
    )
    schema = pa.Table.from_pandas(table.astype({"image_id": "string", "split": "string"})).schema
    if check_schema(schema, path="table") != "published":
        raise ValueError("the reader does not recognise the published layout")
    return schema


def report_preparation(bundle: Bundle) -> None:
    """Splits by position, sections, fragments and the column types of the published layout."""
    for entry in bundle.bodies():
        body = entry.body
        bundle.read_json(entry, "reports")
        count = len(body["reports"])
        for split in body["split_of_index"]:
            chosen = [position for position in range(count) if positional_split(position, count) == split]
            bundle.check_json(entry, f"split_of_index/{split}", chosen)
            bundle.check_json(entry, f"expected/{split}", [_published_row(body["reports"][i]) for i in chosen])
        for position, case in enumerate(body["split_sentences"]):
            bundle.read_json(entry, f"split_sentences/{position}/input")
            bundle.check_json(entry, f"split_sentences/{position}/output", split_fragments(case["input"]))
        schema = _written_schema([_published_row(report) for report in body["reports"]])
        columns = [[field.name, str(field.type)] for field in schema]
        for name in body["arrow_schema_jpg"]:
            is_columns = name in body["split_of_index"]
            value = columns if is_columns else list(schema.pandas_metadata)
            bundle.check_json(
                entry, f"arrow_schema_jpg/{name}", value if is_columns else sorted(value, key=value.index)
            )


def sentence_splitting(bundle: Bundle) -> None:
    """The load-time splitter."""
    for entry in bundle.bodies():
        for position, case in enumerate(entry.body):
            bundle.read_json(entry, f"{position}/input")
            bundle.check_json(entry, f"{position}/output", split_into_sentences(case["input"]))


def _tokenizer(entry: Entry) -> Any:
    return wordpiece_tokenizer_from_vocab(entry.body["vocab"], lowercase=False)


def _encoded(entry: Entry, case: dict[str, Any], separator: str) -> Any:
    return encode_report(
        _tokenizer(entry),
        case["findings_sen"],
        case["impression_sen"],
        max_text_len=case["max_text_len"],
        sent_level=case["sent_level"],
        fragment_separator=SEPARATOR.get(separator, separator),
        rng=random.Random(0),
    )


def sentence_index(bundle: Bundle) -> None:
    """Joined text, token ids, sentence index and stand-alone encodings of every case."""
    for entry in bundle.bodies():
        bundle.read_json(entry, "vocab", "tokenizer")
        for position, case in enumerate(entry.body["cases"]):
            path = f"cases/{position}"
            inputs = ("max_text_len", "findings_sen", "impression_sen", "sent_level")
            bundle.read_json(entry, *(f"{path}/{key}" for key in inputs))
            encoded = _encoded(entry, case, bundle.options["fragment_separator"])
            for key in ("text", "input_ids", "attention_mask", "sentence_index"):
                value = getattr(encoded, key)
                bundle.check_json(entry, f"{path}/{key}", value if isinstance(value, str) else value.tolist())
            sentences = [{"text": each.text, "input_ids": [each.input_ids]} for each in encoded.sentences]
            bundle.check_json(entry, f"{path}/sen_txt", sentences)


def collation(bundle: Bundle) -> None:
    """Padded images, token tensors and the masked copies drawn after seeding."""
    entry = bundle.bodies()[0]
    size = len(bundle.peek("text_ids"))
    encoded = [_encoded(entry, case, bundle.options["fragment_separator"]) for case in entry.body["cases"][:size]]
    bundle.check("image", pad_stack([bundle.read(f"in.image.{position}") for position in range(size)]))
    batch = collate_reports(encoded)
    masker = WholeWordMasker(_tokenizer(entry), bundle.config["mlm_probability"])
    seeds = (bundle.config["python_seed"], bundle.config["torch_seed"])
    batch |= mask_reference(masker, batch["text_ids"], *seeds)
    for name in ("text_ids", "text_labels", "text_masks", "text_ids_mlm", "text_labels_mlm"):
        bundle.check(name, batch[name])
    for position, row in enumerate(batch["sentence_index"]):
        bundle.check(f"sentence_index.{position}", row)


def whole_word_masking(bundle: Bundle) -> None:
    """Positions chosen per seed, before special tokens are cleared."""
    cases = next(entry for entry in bundle.bodies() if "vocab" in entry.body)
    entry = next(entry for entry in bundle.bodies() if "tokens" in entry.body)
    tokenizer = _tokenizer(cases)
    bundle.read_json(entry, "tokens")
    masker = WholeWordMasker(tokenizer)
    for position, case in enumerate(entry.body["cases"]):
        bundle.read_json(entry, f"cases/{position}/python_seed")
        rng = random.Random(case["python_seed"])
        chosen = [masker.choose(tokenizer.convert_tokens_to_ids(tokens), rng) for tokens in entry.body["tokens"]]
        labels = [row.astype(int).tolist() for row in chosen]
        bundle.check_json(entry, f"cases/{position}/mask_labels", labels)
