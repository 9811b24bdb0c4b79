from __future__ import annotations

import pytest
import torch
from golden_support import check_module

from mg3d.models.heads import ITCHead, ITCHeadSingle, ITMHead, MIMHead, SentenceMLMHead, unit_rows


def test_golden_sentence_mlm_head(golden_dir):
    def call(module, inputs):
        logits, sentences, mask = module(inputs["x"], inputs["sentence_index"])
        rows = {f"sen.{b}": s[m].unsqueeze(0) for b, (s, m) in enumerate(zip(sentences, mask, strict=True))}
        return {"logits": logits, **rows}

    check_module(golden_dir, "sen_mlm_head", lambda t, c: SentenceMLMHead(c["D"], c["vocab"]), call)


def test_golden_mim_head(golden_dir):
    def call(module, inputs):
        return {"recon": module(inputs["x"]), "rec_feats": module.token_features(inputs["x"])}

    check_module(golden_dir, "mim_head_vae", lambda t, c: MIMHead(c["D"]), call)


@pytest.mark.parametrize(
    ("entry", "make"),
    [
        ("itc_head", lambda t, c: ITCHead(c["in_dim"], c["D"], c["temp"])),
        ("itc_head_single", lambda t, c: ITCHeadSingle(c["in_dim"], c["temp"])),
    ],
)
def test_golden_itc_heads(golden_dir, entry, make):
    def call(module, inputs):
        per_image, per_text = module(inputs["image"], inputs["text"])
        return {"logits_per_image": per_image, "logits_per_text": per_text}

    check_module(golden_dir, entry, make, call)


def test_golden_itm_head(golden_dir):
    check_module(golden_dir, "itm_head", lambda t, c: ITMHead(2 * c["D"]), lambda m, i: {"logits": m(i["x"])})


def test_mim_head_equals_its_layers_in_published_order():
    torch.manual_seed(0)
    head = MIMHead(32)
    grid = torch.randn(2, 32, 1, 2, 1)
    assert head(grid).shape == (2, 1, 32, 64, 32)
    torch.testing.assert_close(head(grid), head.conv(grid), rtol=1e-4, atol=1e-5)


def test_mim_head_refuses_odd_width():
    with pytest.raises(ValueError, match="divisible by 16"):
        MIMHead(40)


def test_sentence_branch_ignores_the_rest_of_the_batch():
    torch.manual_seed(1)
    head = SentenceMLMHead(16, 20)
    x = torch.randn(2, 8, 16)
    index = torch.tensor([[-1, 1, 1, 2, 2, 3, 3, -1], [-1, 1, 1, 1, -1, -1, -1, -1]])
    _, sentences, mask = head(x, index)
    _, alone, _ = head(x[1:], index[1:])
    assert mask.sum(1).tolist() == [3, 1] and not sentences[1, 1:].any()
    torch.testing.assert_close(sentences[1, :1], alone[0])


def test_zero_rows_stay_finite():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    rows = unit_rows(x)
    rows.sum().backward()
    torch.testing.assert_close(rows.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert x.grad is not None and x.grad.isfinite().all()


def test_logits_stay_float32_under_autocast():
    head = ITCHead(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        per_image, per_text = head(torch.randn(3, 16), torch.randn(3, 16))
    assert per_image.dtype == per_text.dtype == torch.float32
    assert per_image.abs().max() <= 10.0 + 1e-4
