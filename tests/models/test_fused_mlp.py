"""The MLP of a Swin block, worked through in portions, is MONAI's own."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import MLPBlock
from torch import Tensor, nn

from mg3d.models.vision_encoders import worker_threads
from mg3d.models.vision_encoders.fused_mlp import can_fuse_mlp, mlp_half


def parts(channels: int = 12, dropout: float = 0.0) -> tuple[nn.LayerNorm, MLPBlock]:
    torch.manual_seed(0)
    norm, mlp = nn.LayerNorm(channels), MLPBlock(channels, 4 * channels, dropout, dropout_mode="swin")
    for parameter in [*norm.parameters(), *mlp.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    return norm, mlp


def gradients(result: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1.0, 1.0, result.numel()).view(result.shape)
    return torch.autograd.grad((result * weights).sum(), wanted)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "rows"), [((1, 2, 3, 4, 12), 5), ((2, 3, 5, 7, 12), 1000), ((1, 1, 1, 1, 12), 4)])
def test_values_and_gradients_are_those_of_the_plain_layers(
    threads: int, shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, mlp = parts()
    x = torch.randn(shape, requires_grad=True)
    wanted = [x, *norm.parameters(), *mlp.parameters()]
    monkeypatch.setattr(worker_threads, "PORTION_BYTES", rows * 4 * 48)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, plain = mlp_half(norm, mlp, x), x + mlp(norm(x))
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients(ours, wanted), gradients(plain, wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_a_transposed_input_and_a_transposed_gradient_change_nothing() -> None:
    norm, mlp = parts()
    x = torch.randn(4, 12, 3)
    moved = x.transpose(1, 2).requires_grad_()
    result = mlp_half(norm, mlp, moved)
    (grad,) = torch.autograd.grad(result.transpose(1, 2).sum(), moved)
    plain = moved + mlp(norm(moved))
    (expected,) = torch.autograd.grad(plain.sum(), moved)
    torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_it_is_used_only_where_it_computes_the_same() -> None:
    norm, mlp = parts()
    x = torch.randn(2, 12)
    assert can_fuse_mlp(norm, mlp, x)
    assert not can_fuse_mlp(norm, mlp, x.double()) and not can_fuse_mlp(norm, mlp, x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_fuse_mlp(norm, mlp, x)
    norm, dropping = parts(dropout=0.5)
    assert not can_fuse_mlp(norm, dropping, x) and can_fuse_mlp(norm, dropping.eval(), x)
