"""The report head: first values, positions, what counts in the loss, and generation that depends on nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import bert_config
from torch import Tensor
from transformers import BertModel, RobertaConfig, RobertaModel

from mg3d.datasets.report_targets import encode_targets
from mg3d.datasets.report_text import wordpiece_tokenizer_from_vocab
from mg3d.errors import ConfigError
from mg3d.models.clm import CausalReportHead, GenerationOptions
from mg3d.models.clm.decoder import SpecialTokens
from mg3d.models.language_encoders import BertTextEncoder

START, END, PAD, WIDTH, VOCAB = 2, 3, 0, 20, 60
TOKENS = SpecialTokens(START, END, PAD, (PAD, 1, START, 4))


def bert() -> BertTextEncoder:
    torch.manual_seed(3)
    return BertTextEncoder(BertModel(bert_config(VOCAB, initializer_range=0.3)).eval())


def roberta() -> BertTextEncoder:
    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = RobertaConfig(
        vocab_size=VOCAB, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1, initializer_range=0.3, **sizes
    )
    return BertTextEncoder(RobertaModel(config).eval())


def make_head(text: BertTextEncoder | None = None, tokens: SpecialTokens = TOKENS) -> CausalReportHead:
    return CausalReportHead(text or bert(), tokens, WIDTH, (6, WIDTH)).eval()


def images(count: int, tokens: int = 6) -> Tensor:
    return torch.randn(count, tokens, WIDTH, generator=torch.Generator().manual_seed(1)) * 3


def reports(count: int = 3, length: int = 9) -> Tensor:
    words = torch.randint(5, VOCAB, (count, length), generator=torch.Generator().manual_seed(2))
    words[:, 0], words[:, -1] = START, END
    return words


@pytest.mark.parametrize("make", [bert, roberta])
def test_decoder_starts_as_the_text_encoder(make: Any) -> None:
    text = make()
    head = make_head(text)
    ids = reports()
    target = dict(head.decoder.named_parameters())
    for name, value in text.encoder.named_parameters():
        assert torch.equal(target[f"bert.encoder.{name}"], value), name
    with torch.no_grad():
        assert torch.allclose(head.decoder.bert.embeddings(ids), text.embed(ids), atol=1e-6)
    fresh = set(head.initialisation.new)
    assert fresh == {name for name in target if "crossattention" in name} | {"lm_head.bias"}
    assert fresh | set(head.initialisation.copied) == set(target) and len(target) > 50
    # words that are predicted are the words that are read
    assert head.decoder.lm_head.decoder.weight is head.decoder.bert.embeddings.word_embeddings.weight
    assert head.longest == text.max_length == 64


def test_without_an_image_the_last_word_sees_what_the_encoder_sees() -> None:
    """Copied layers compute the same: the last position of a causal decoder sees the whole text, as in the encoder."""
    text, one = bert(), reports(1, 1)
    head = make_head(text)
    with torch.no_grad():
        alone = head.decoder.bert(input_ids=one).last_hidden_state
        assert torch.allclose(alone, text(one, torch.ones_like(one)), atol=1e-5)


def test_a_position_sees_itself_and_earlier_ones_and_the_image() -> None:
    head, ids, image = make_head(), reports(), images(3)
    with torch.no_grad():
        whole = head.logits(image, ids)
        later = ids.clone()
        later[:, 5:] = 7
        assert torch.allclose(head.logits(image, later)[:, :5], whole[:, :5], atol=1e-5)
        assert not torch.allclose(head.logits(image, later)[:, 5:], whole[:, 5:], atol=1e-2)
        assert not torch.allclose(head.logits(image.flip(0), ids), whole, atol=1e-2)


def test_loss_is_that_of_the_next_word_and_leaves_padding_out() -> None:
    head, ids, image = make_head(), reports(), images(3)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    padded = ids.clone()
    padded[1, 6:] = PAD
    with torch.no_grad():
        loss = head.loss(image, padded, mask)
        logs = head.logits(image, padded[:, :-1]).log_softmax(-1)
        each = -logs.gather(2, padded[:, 1:, None])[..., 0]
        assert loss.item() == pytest.approx((each * mask[:, 1:]).sum().item() / mask[:, 1:].sum().item(), rel=1e-5)
        longer = torch.nn.functional.pad(padded, (0, 5), value=PAD), torch.nn.functional.pad(mask, (0, 5))
        assert head.loss(image, *longer).item() == pytest.approx(loss.item(), rel=1e-5)
        other = padded.clone()
        other[1, 6:] = 9  # what stands in the padding
        assert head.loss(image, other, mask).item() == pytest.approx(loss.item(), rel=1e-5)


def search(head: CausalReportHead, image: Tensor, **options: Any) -> Tensor:
    return head.generate(image, GenerationOptions(**({"longest": 24, "beams": 3} | options)))


@pytest.fixture(scope="module")
def writer() -> CausalReportHead:
    """A head that has learned four texts of different length a little, so that ends and words compete."""
    head = make_head().train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    ids = reports(4, 12)
    mask = torch.ones_like(ids)
    for row, length in enumerate((4, 6, 9, 12)):
        ids[row, length - 1], mask[row, length:] = END, 0
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(images(4), ids, mask).backward()
        optimizer.step()
    return head.eval()


def test_generation_with_and_without_cache_is_the_same(writer: CausalReportHead) -> None:
    image = images(4)
    for beams in (1, 3):
        kept = search(writer, image, beams=beams)
        assert torch.equal(kept, search(writer, image, beams=beams, cache=False))
        assert (kept[:, 0] == START).all() and kept.shape[1] <= 24
        assert len({tuple(row) for row in kept.tolist()}) > 1, "the reports follow the image"


def test_one_beam_is_greedy(writer: CausalReportHead) -> None:
    image, ids = images(2), torch.full((2, 1), START)
    with torch.no_grad():
        for _ in range(10):
            scores = writer.logits(image, ids)[:, -1]
            scores[:, list(TOKENS.never)] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    written = search(writer, image, beams=1)
    for row, greedy in zip(written.tolist(), ids.tolist(), strict=True):
        end = row.index(END) + 1 if END in row else len(row)
        assert row[: min(end, 11)] == greedy[: min(end, 11)]


def test_a_report_does_not_depend_on_the_others_of_its_batch(writer: CausalReportHead) -> None:
    def words(ids: Tensor) -> list[list[int]]:
        return [row[: row.index(END)] if END in row else row for row in ids.tolist()]

    image = images(5)
    together = words(search(writer, image))
    order = [3, 0, 4, 2, 1]
    assert words(search(writer, image[order])) == [together[place] for place in order]
    assert [words(search(writer, image[place : place + 1]))[0] for place in range(5)] == together


def test_never_written_tokens_and_the_longest_report(writer: CausalReportHead) -> None:
    short = search(writer, images(3), longest=5)
    assert short.shape[1] <= 5
    torch.manual_seed(0)
    drawn = writer.generate(images(3), GenerationOptions(40, sample=True))
    assert not set(drawn[:, 1:].flatten().tolist()) & {1, START, 4}
    torch.manual_seed(0)
    assert torch.equal(drawn, writer.generate(images(3), GenerationOptions(40, sample=True)))


def test_standardised_tokens_have_mean_zero_and_spread_one() -> None:
    head, image = make_head(), 5 + images(40) * torch.linspace(1, 3, WIDTH)
    assert torch.equal(head.standard(image), image) and not head.is_standardised
    head.standardise(image)
    assert head.is_standardised
    assert torch.allclose(head.standard(image).mean(0), torch.zeros(6, WIDTH), atol=1e-4)
    assert torch.allclose(head.standard(image).std(0), torch.ones(6, WIDTH), atol=1e-4)
    head.standardise(torch.ones(3, 6, WIDTH))  # nothing differs: no division by zero
    assert torch.isfinite(head.standard(torch.ones(1, 6, WIDTH))).all()


def test_too_long_reports_are_refused() -> None:
    head = make_head()
    head.check_length("clm_max_text_len", 64)
    with pytest.raises(ConfigError, match=r"clm_max_text_len=65 exceeds the text model's 64"):
        head.check_length("clm_max_text_len", 65)


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "no", "lung", "nodule", "clear", "##s"]


def roberta_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *VOCABULARY[5:]]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_targets_begin_end_and_pad_as_their_tokenizer_does(kind: str, tmp_path: Path) -> None:
    tokenizer = wordpiece_tokenizer_from_vocab(VOCABULARY) if kind == "bert" else roberta_tokenizer(tmp_path)
    start, end, pad = (2, 3, 0) if kind == "bert" else (0, 2, 1)
    tokens = SpecialTokens.of(tokenizer)
    assert (tokens.start, tokens.end, tokens.pad) == (start, end, pad)
    assert set(tokens.never) == {0, 1, 2, 3, 4} - {end}
    ids, mask = encode_targets(tokenizer, ["no nodule .", "lung clear . no nodule ."], 7)
    assert ids[0].tolist() == [start, 6, 8, 5, end, pad, pad] and mask[0].tolist() == [1] * 5 + [0] * 2
    # cut: no end, so that stopping in the middle is not learned
    assert ids[1].tolist() == [start, 7, 9, 5, 6, 8, 5] and mask[1].all()
    assert encode_targets(tokenizer, ["lung clear . no nodule ."], 8)[0][0, -1] == end


@pytest.mark.parametrize("name", ["cls_token", "sep_token", "pad_token"])
def test_a_tokenizer_without_start_end_or_padding_is_refused(name: str) -> None:
    tokenizer = copy.deepcopy(wordpiece_tokenizer_from_vocab(VOCABULARY))
    setattr(tokenizer, name, None)
    with pytest.raises(ConfigError, match=name):
        SpecialTokens.of(tokenizer)
