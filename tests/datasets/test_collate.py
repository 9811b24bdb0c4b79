from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from arrow_builders import SHAPE_DHW, tokenizer, write_arrow
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.collate import PretrainCollator, collate_reports, mask_reference, pad_stack
from mg3d.datasets.report_text import encode_report, wordpiece_tokenizer_from_vocab
from mg3d.datasets.seeding import sample_seed
from mg3d.datasets.volume_report import VolumeReportDataset
from mg3d.datasets.whole_word_mask import WholeWordMasker
from mg3d.mim_cells import cell_grid, random_cells

TOKENIZER = tokenizer()


def samples(tmp_path: Path, count: int = 4, **options: object) -> list:
    path = write_arrow(tmp_path / "a.arrow", count)
    data = VolumeReportDataset(
        ArrowTable([path]), corpus="clm_ct_rate", tokenizer=TOKENIZER, size_dhw=SHAPE_DHW, max_text_len=40, **options
    )
    return [data[row] for row in range(count)]


def test_batch_equals_golden(golden_dir: Path) -> None:
    text = json.loads((golden_dir / "text_sentence_index.json").read_text(encoding="utf-8"))
    index = json.loads((golden_dir / "index.json").read_text(encoding="utf-8"))
    config = next(entry for entry in index["entries"] if entry["name"] == "collate_tensors")["config"]
    stored = load_file(golden_dir / "collate_tensors.safetensors")
    tok = wordpiece_tokenizer_from_vocab(text["vocab"], lowercase=False)
    size = len(stored["text_ids"])
    reports = [
        encode_report(
            tok,
            case["findings_sen"],
            case["impression_sen"],
            max_text_len=case["max_text_len"],
            fragment_separator="none_reference",
        )
        for case in text["cases"][:size]
    ]
    batch = collate_reports(reports)
    masker = WholeWordMasker(tok, config["mlm_probability"])
    batch |= mask_reference(masker, batch["text_ids"], config["python_seed"], config["torch_seed"])
    for key in ("text_ids", "text_masks", "text_labels", "text_ids_mlm", "text_labels_mlm"):
        assert torch.equal(batch[key], stored[key]), key
    for b in range(size):
        assert torch.equal(batch["sentence_index"][b], stored[f"sentence_index.{b}"])
    images = pad_stack([stored[f"in.image.{b}"] for b in range(size)])
    torch.testing.assert_close(images, stored["image"])


def test_batch_has_the_agreed_keys_shapes_and_types(tmp_path: Path) -> None:
    collate = PretrainCollator(WholeWordMasker(TOKENIZER), mim_window=2, mim_mask_ratio=0.5)
    batch = collate(samples(tmp_path, draw_false_image=2))
    sentences, tokens = batch["sen_txt_ids"].shape[1:]
    expected = {
        "image": ((4, 8, 1, 6, 10), torch.float32),
        **{k: ((4, 40), torch.int64) for k in ("text_ids", "text_masks", "text_labels", "text_ids_mlm")},
        **{k: ((4, 40), torch.int64) for k in ("text_labels_mlm", "sentence_index")},
        **{k: ((4, sentences, tokens), torch.int64) for k in ("sen_txt_ids", "sen_txt_masks")},
        "sentence_mask": ((4, sentences), torch.bool),
        "has_text": ((4,), torch.bool),
        "mim_mask": ((4, 4, 3, 5), torch.bool),
        "labels": ((4, 18), torch.int8),
        "index": ((4,), torch.int64),
        "report_key": ((4,), torch.int64),
        "false_image": ((4, 2, 8, 1, 6, 10), torch.float32),
    }
    found = {key: (tuple(value.shape), value.dtype) for key, value in batch.items() if torch.is_tensor(value)}
    assert found == expected
    assert {key for key in batch if key not in found} == {"report", "image_id", "patient_id", "corpus"}
    assert (batch["text_labels"] == -100).all()
    assert torch.equal(batch["sentence_mask"].sum(1), batch["sentence_index"].max(1).values)
    assert torch.equal(batch["sen_txt_masks"].any(2), batch["sentence_mask"])
    assert (batch["sen_txt_ids"][batch["sen_txt_masks"] == 0] == 0).all()


def test_a_sample_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    collate = PretrainCollator(WholeWordMasker(TOKENIZER), mim_window=2)
    items = samples(tmp_path)
    batch, alone = collate(items), collate(items[2:3])
    for key in ("text_ids_mlm", "text_labels_mlm", "mim_mask", "image"):
        assert torch.equal(batch[key][2], alone[key][0])
    assert not torch.equal(batch["mim_mask"][0], batch["mim_mask"][1])


def test_without_masker_and_cells(tmp_path: Path) -> None:
    batch = PretrainCollator()(samples(tmp_path, 1, image_only=True))
    assert "mim_mask" not in batch and "false_image" not in batch
    assert torch.equal(batch["text_ids_mlm"], batch["text_ids"]) and (batch["text_labels_mlm"] == -100).all()
    assert not batch["has_text"].any() and batch["sen_txt_ids"].shape == (1, 1, 1) and not batch["sentence_mask"].any()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_padding_is_undone_by_cropping(shapes: list[tuple[int, int]]) -> None:
    tensors = [torch.rand(shape) + 1 for shape in shapes]
    out = pad_stack(tensors)
    for row, tensor in zip(out, tensors, strict=True):
        assert torch.equal(row[: tensor.shape[0], : tensor.shape[1]], tensor)
        assert row.count_nonzero() == tensor.numel()


FRAGMENTS = st.lists(st.sampled_from(["lungs clear, ", "no nodule; ", "mass", "heart size normal. "]), max_size=5)


@given(st.lists(FRAGMENTS, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_batch_of_reports_gives_every_report_back(fragments: list[list[str]]) -> None:
    reports = [encode_report(TOKENIZER, each, [], max_text_len=16) for each in fragments]
    batch = collate_reports(reports)
    for b, report in enumerate(reports):
        assert batch["text_ids"][b].tolist() == report.input_ids.tolist()
        assert batch["sentence_index"][b].tolist() == report.sentence_index.tolist()
        rows = batch["sentence_mask"][b].nonzero().flatten().tolist()
        held = [batch["sen_txt_ids"][b, s][batch["sen_txt_masks"][b, s] > 0].tolist() for s in rows]
        assert held == [list(sentence.input_ids) for sentence in report.sentences]
        assert (bool(batch["has_text"][b]), batch["report"][b]) == (report.has_text, report.text)


def test_padding_refuses_other_ranks() -> None:
    with pytest.raises(ValueError, match=r"\(2,\), \(2, 2\)"):
        pad_stack([torch.zeros(2), torch.zeros(2, 2)])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_hidden_cells_count_and_seed(ratio: float) -> None:
    grid = cell_grid((128, 96, 128), 16)
    assert grid == (8, 6, 8)
    cells = random_cells(3, grid, ratio)
    assert cells.shape == grid and cells.sum() == round(384 * ratio)
    np.testing.assert_array_equal(cells, random_cells(3, grid, ratio))
    share = np.mean([random_cells(seed, grid, 0.25) for seed in range(200)], axis=0)
    assert abs(share - 0.25).max() < 0.15


def test_cells_and_seeds_refuse_nonsense() -> None:
    assert cell_grid((128, 100, 17), 16) == (8, 7, 2)
    with pytest.raises(ValueError, match="positive mim_window"):
        cell_grid((128, 96, 128), 0)
    with pytest.raises(ValueError, match="mim_mask_ratio"):
        random_cells(0, (2, 2, 2), 1.5)
    with pytest.raises(ValueError, match="unknown purpose"):
        sample_seed(0, 0, 0, "other")
    seeds = {sample_seed(s, e, r, p) for s in (0, 1) for e in (0, 1) for r in (0, 1) for p in ("words", "cells")}
    assert len(seeds) == 16
