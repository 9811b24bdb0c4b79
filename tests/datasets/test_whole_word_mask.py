from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from arrow_builders import tokenizer

from mg3d.datasets.report_text import encode_report, wordpiece_tokenizer_from_vocab
from mg3d.datasets.whole_word_mask import WholeWordMasker

TOKENIZER = tokenizer()


def sentence(words: str, length: int = 60) -> torch.Tensor:
    return torch.from_numpy(encode_report(TOKENIZER, [words], [], max_text_len=length).input_ids)


def test_choice_equals_golden(golden_dir: Path) -> None:
    vocab = json.loads((golden_dir / "text_sentence_index.json").read_text(encoding="utf-8"))["vocab"]
    stored = json.loads((golden_dir / "whole_word_mask.json").read_text(encoding="utf-8"))
    tok = wordpiece_tokenizer_from_vocab(vocab, lowercase=False)
    masker = WholeWordMasker(tok)
    assert stored["cases"] and stored["tokens"]
    for case in stored["cases"]:
        rng = random.Random(case["python_seed"])
        for tokens, labels in zip(stored["tokens"], case["mask_labels"], strict=True):
            assert masker.choose(tok.convert_tokens_to_ids(tokens), rng).astype(int).tolist() == labels


def test_words_are_masked_whole_and_specials_never() -> None:
    ids = sentence("lungses nodules effusions masses hearts " * 5)
    masker = WholeWordMasker(TOKENIZER, 0.4, "real")
    continuation = torch.tensor([t.startswith("##") for t in TOKENIZER.convert_ids_to_tokens(ids)])
    special = torch.tensor([int(i) in TOKENIZER.all_special_ids for i in ids])
    for seed in range(20):
        _, labels = masker.mask_sample(ids, seed)
        chosen = labels != -100
        assert not (chosen & special).any()
        assert (chosen[1:] == chosen[:-1])[continuation[1:]].all()
        assert (labels[chosen] == ids[chosen]).all()


def test_real_budget_counts_real_tokens_and_padded_fluctuates() -> None:
    ids = sentence("no nodule seen heart size is normal the lungs are clear " * 2, length=250)
    real = int((ids > 4).sum())
    counts = {
        budget: [
            int((WholeWordMasker(TOKENIZER, 0.15, budget).mask_sample(ids, s)[1] != -100).sum()) for s in range(30)
        ]
        for budget in ("real", "padded_reference")
    }
    assert set(counts["real"]) == {round(0.15 * real)}
    assert len(set(counts["padded_reference"])) > 1


def test_replacement_shares_and_seeds() -> None:
    ids = sentence("no nodule seen heart size is normal the lungs are clear " * 20, length=250)
    masker = WholeWordMasker(TOKENIZER, 0.9, "real")
    masked, kept, total = 0, 0, 0
    for seed in range(40):
        out, labels = masker.mask_sample(ids, seed)
        chosen = labels != -100
        masked += int((out[chosen] == TOKENIZER.mask_token_id).sum())
        kept += int((out[chosen] == ids[chosen]).sum())
        total += int(chosen.sum())
        assert (out[~chosen] == ids[~chosen]).all()
    assert masked / total == pytest.approx(0.8 + 0.1 / len(TOKENIZER), abs=0.02)
    assert kept / total == pytest.approx(0.1 + 0.1 / len(TOKENIZER), abs=0.02)
    first, second = masker.mask_sample(ids, 7), masker.mask_sample(ids, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_token_per_word_when_whole_words_are_off() -> None:
    ids = sentence("lungses lungses lungses")
    masker = WholeWordMasker(TOKENIZER, 0.3, "real", whole_words=False)
    sizes = {int((masker.mask_sample(ids, seed)[1] != -100).sum()) for seed in range(10)}
    assert sizes == {round(0.3 * int((ids > 4).sum()))}


def test_empty_text_has_nothing_to_predict() -> None:
    ids = sentence("", length=10)
    for budget in ("real", "padded_reference"):
        out, labels = WholeWordMasker(TOKENIZER, 0.15, budget).mask_sample(ids, 0)
        assert (labels == -100).all() and torch.equal(out, ids)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="wwm_budget"):
        WholeWordMasker(TOKENIZER, 0.15, "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mlm_prob"):
        WholeWordMasker(TOKENIZER, 1.5)
