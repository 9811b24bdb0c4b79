from __future__ import annotations

import pytest
import torch
from golden_support import check_module

from mg3d.models.fusion import MIMCrossAttention, MLMCrossAttention, UnidirectionalCrossAttention
from mg3d.models.pooling import SentenceAttentionPool

C, NUM_A, NUM_B = 16, 6, 5


def build(kind: str, variant: str, hidden: int = C, num_a: int = NUM_A, num_b: int = NUM_B) -> torch.nn.Module:
    if kind == "mlm":
        return MLMCrossAttention(hidden, num_a, num_b, variant=variant)
    return MIMCrossAttention(hidden, num_a, variant=variant)


def sets(batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, NUM_A, C, generator=generator), torch.randn(batch, NUM_B, C, generator=generator)


@pytest.mark.parametrize("kind", ["mlm", "mim"])
@pytest.mark.parametrize("variant", ["mean", "unet", "ctrate"])
def test_golden(golden_dir, kind, variant):
    def make(tensors, config):
        return build(kind, variant, config["embed_dim"], config["I"], config["T"])

    def call(module, inputs):
        names = ("context2", "probs2", "context1", "probs1")
        outputs = module(inputs["tensor1"].unsqueeze(0), inputs["tensor2"].unsqueeze(0))
        return {name: out.squeeze(0) for name, out in zip(names, outputs, strict=True)}

    check_module(golden_dir, f"attn_{kind}_cross_{variant}", make, call)


def test_golden_unidirectional(golden_dir):
    def call(module, inputs):
        context, probs = module(inputs["tensor1"].unsqueeze(0), inputs["tensor2"].unsqueeze(0))
        return {"context1": context.squeeze(0), "probs1": probs.squeeze(0)}

    check_module(golden_dir, "attn_unidir", lambda t, c: UnidirectionalCrossAttention(c["embed_dim"]), call)


@pytest.mark.parametrize("kind", ["mlm", "mim"])
@pytest.mark.parametrize("variant", ["mean", "unet", "ctrate"])
def test_padded_b_equals_unpadded_samples(kind, variant):
    torch.manual_seed(1)
    layer = build(kind, variant)
    a, b = sets()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    context2, probs2, context1, probs1 = layer(a, b, mask_b_BT=mask)
    for k, length in enumerate(mask.sum(1).tolist()):
        single = build(kind, variant, num_b=length)
        state = layer.state_dict()
        if kind == "mlm":
            state["fc2.weight"] = state["fc2.weight"][:, :length]
        single.load_state_dict(state)
        want = single(a[k : k + 1], b[k : k + 1, :length])
        got = (context2[k], probs2[k, :, :length], context1[k, :length], probs1[k, :length])
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w[0], rtol=1e-4, atol=1e-6)
        assert not context1[k, length:].any() and not probs1[k, length:].any() and not probs2[k, :, length:].any()


@pytest.mark.parametrize("variant", ["mean", "ctrate"])
def test_padded_a_equals_unpadded_samples(variant):
    torch.manual_seed(1)
    layer = build("mim", variant)
    a, b = sets()
    mask = torch.arange(NUM_A).unsqueeze(0) < torch.tensor([[6], [3], [1]])
    context2, _, context1, _ = layer(a, b, mask_a_BI=mask)
    for k, length in enumerate(mask.sum(1).tolist()):
        want2, _, want1, _ = layer(a[k : k + 1, :length], b[k : k + 1])
        torch.testing.assert_close(context2[k, :length], want2[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(context1[k], want1[0], rtol=1e-4, atol=1e-6)
        assert not context2[k, length:].any()


def test_closed_pool_equals_pool_of_built_rows():
    torch.manual_seed(2)
    pool = SentenceAttentionPool(32, C, num_heads=4)
    row, scale = torch.randn(2, NUM_A, C), torch.rand(2, NUM_A, NUM_B)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    built = (scale.unsqueeze(-1) * row.unsqueeze(2)).flatten(0, 1)
    want = pool(built, mask.repeat_interleave(NUM_A, dim=0)).view(2, NUM_A, C)
    torch.testing.assert_close(pool.pool_scaled_row(row, scale, mask), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlm", "mim"])
@pytest.mark.parametrize("variant", ["mean", "unet", "ctrate"])
def test_empty_report_is_finite_and_silent(kind, variant):
    torch.manual_seed(3)
    layer = build(kind, variant)
    a, b = (x.requires_grad_() for x in sets(2))
    mask = torch.tensor([[1] * NUM_B, [0] * NUM_B]).bool()
    outputs = layer(a, b, mask_b_BT=mask)
    sum(out.square().sum() for out in outputs).backward()
    assert all(out.isfinite().all() for out in outputs)
    assert not outputs[2][1].any()
    assert a.grad is not None and b.grad is not None
    assert a.grad.isfinite().all() and not b.grad[1].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("variant", ["mean", "ctrate"])
def test_order_of_sentences_and_samples_does_not_matter(variant):
    torch.manual_seed(4)
    layer = build("mim", variant)
    a, b = sets()
    order, batch = torch.randperm(NUM_B), torch.tensor([2, 0, 1])
    context2, _, context1, _ = layer(a, b)
    moved2, _, moved1, _ = layer(a[batch], b[batch][:, order])
    torch.testing.assert_close(moved2, context2[batch], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved1, context1[batch][:, order], rtol=1e-4, atol=1e-6)


def test_gate_each_equals_one_call_per_row():
    torch.manual_seed(5)
    layer = UnidirectionalCrossAttention(C)
    a, b = sets(2)
    gated, probs = layer.gate_each(a, b[:, :1], torch.tensor([[1] * NUM_A, [1, 1, 0, 0, 0, 0]]).bool())
    for i in range(NUM_A):
        context, prob = layer(a[:1, i : i + 1], b[:1, :1])
        torch.testing.assert_close(gated[0, i], context[0, 0])
        torch.testing.assert_close(probs[0, i], prob[0, 0, 0])
    assert not gated[1, 2:].any()


@pytest.mark.parametrize("kind", ["mlm", "mim"])
@pytest.mark.parametrize("variant", ["mean", "unet", "ctrate"])
def test_half_precision_stays_close(kind, variant):
    torch.manual_seed(6)
    layer = build(kind, variant)
    a, b = sets()
    mask = torch.arange(NUM_B) < torch.tensor([[5], [2], [0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(a, b, mask_b_BT=mask)
    sum(out.float().square().sum() for out in half).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    for got, want in zip(half, layer(a, b, mask_b_BT=mask), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_wrong_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="variant 'sum'"):
        build("mlm", "sum")
    a, b = sets()
    with pytest.raises(ValueError, match="built for 5"):
        build("mlm", "unet")(a, b[:, :3])
