from __future__ import annotations

import pytest
import torch
from golden_support import check_gradients, check_module, check_outputs, load_entry, under

from mg3d.models.pooling import (
    FeatureNorm,
    Pooler,
    SentenceAttentionPool,
    SentencePooler,
    SwinAttPooler,
    SwinPooler,
    masked_mean,
    sentence_gather,
)


@pytest.mark.parametrize("entry", ["S1", "S5", "pos"])
def test_golden_sentence_attention_pool(golden_dir, entry):
    def make(tensors, config):
        return SentenceAttentionPool(32, config["D"], config["heads"], pos_embed=entry == "pos")

    check_module(golden_dir, f"sentence_attention_pool_{entry}", make, lambda m, i: {"pooled": m(i["x"])})


@pytest.mark.parametrize(
    ("entry", "make"),
    [
        ("pooler", lambda t, c: Pooler(c["D"])),
        ("swin_pooler", lambda t, c: SwinPooler(c["N"], c["D"])),
        ("swin_att_pooler", lambda t, c: SwinAttPooler(c["D"])),
        ("sentence_pooler_S1", lambda t, c: SentencePooler(c["D"])),
        ("sentence_pooler_S5", lambda t, c: SentencePooler(c["D"])),
    ],
)
def test_golden_poolers(golden_dir, entry, make):
    check_module(golden_dir, entry, make, lambda m, i: {"pooled": m(i["x"])})


def test_golden_sentence_gather(golden_dir):
    tensors, record = load_entry(golden_dir, "sentence_gather_avg")
    x = tensors["in.x"].requires_grad_()
    sentences, mask = sentence_gather(x, tensors["in.sentence_index"])
    outputs = {str(b): row[m].unsqueeze(0) for b, (row, m) in enumerate(zip(sentences, mask, strict=True))}
    check_outputs(outputs, under(tensors, "out"), record)
    cotangents = under(tensors, "cot")
    torch.stack([(outputs[b] * cotangents[b]).sum() for b in cotangents]).sum().backward()
    check_gradients({"in.x": x.grad}, under(tensors, "grad"), record)
    whole, _ = sentence_gather(x, None)
    check_outputs({str(b): row.unsqueeze(0) for b, row in enumerate(whole)}, under(tensors, "out_no_batch"), record)


def test_gather_skips_gaps_and_pads():
    tokens = torch.arange(12.0).view(2, 6, 1)
    index = torch.tensor([[-1, 7, 7, 2, 2, -1], [0, -1, -1, -1, -1, -1]])
    sentences, mask = sentence_gather(tokens, index, num_sentences=4)
    assert mask.tolist() == [[True, True, False, False], [False] * 4]
    assert sentences[..., 0].tolist() == [[3.5, 1.5, 0.0, 0.0], [0.0] * 4]
    shortest, _ = sentence_gather(tokens[1:], index[1:])
    assert shortest.shape == (1, 1, 1)


def test_gather_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 30, 5, generator=generator)
    index = torch.randint(-1, 9, (4, 30), generator=generator)
    sentences, mask = sentence_gather(tokens, index)
    for b in range(4):
        want = [tokens[b][index[b] == i].mean(0) for i in sorted(set(index[b].tolist())) if i > 0]
        torch.testing.assert_close(sentences[b][mask[b]], torch.stack(want))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SentenceAttentionPool(32, 16, 4),
        lambda: SentenceAttentionPool(32, 16, 4, pos_embed=True),
        lambda: SwinAttPooler(16),
    ],
)
def test_padding_does_not_change_a_pool(make):
    torch.manual_seed(1)
    pool = make()
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    pooled = pool(x, mask)
    for b, length in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(pooled[b], pool(x[b : b + 1, :length])[0])
    torch.testing.assert_close(pool(x + 100 * ~mask.unsqueeze(-1), mask), pooled)


@pytest.mark.parametrize("make", [lambda: SentenceAttentionPool(32, 16, 4), lambda: SwinAttPooler(16)])
def test_empty_row_gives_zeros_with_finite_gradients(make):
    torch.manual_seed(2)
    pool = make()
    x = torch.randn(2, 3, 16, requires_grad=True)
    pooled = pool(x, torch.tensor([[1, 1, 0], [0, 0, 0]]).bool())
    pooled.square().sum().backward()
    assert not pooled[1].any() and pooled[0].any()
    assert x.grad is not None and x.grad.isfinite().all() and not x.grad[1].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pool.parameters())


def test_pool_does_not_depend_on_the_order():
    torch.manual_seed(3)
    pool = SentenceAttentionPool(32, 16, 4)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(pool(x[:, torch.randperm(6)]), pool(x))


def test_sentence_pooler_masks_and_feature_norm_normalises_rows():
    torch.manual_seed(4)
    pooler = SentencePooler(16)
    x = torch.randn(2, 3, 16)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    features = pooler(x, mask)
    assert features.shape == (2, 3, 128) and not features[~mask].any()
    torch.testing.assert_close(features[mask], pooler(x[mask].unsqueeze(0))[0])
    rows = FeatureNorm(16)(3 * x + 5)
    torch.testing.assert_close(rows.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(-1, correction=0), torch.ones(2, 3), atol=1e-3, rtol=0)


def test_half_precision_runs():
    pool = SentenceAttentionPool(32, 16, 4).bfloat16()
    pooled = pool(torch.randn(1, 2, 16).bfloat16(), torch.ones(1, 2).bool())
    assert pooled.dtype == torch.bfloat16 and pooled.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="position table of 2"):
        SentenceAttentionPool(2, 16, 4, pos_embed=True)(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="built for 4"):
        SwinPooler(4, 16)(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="num_heads"):
        SentenceAttentionPool(2, 15, 4)
    assert masked_mean(torch.ones(1, 2, 3)).tolist() == [[1.0] * 3]
