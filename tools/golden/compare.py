"""How a computed value is held against a recorded one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from tools.golden.index import GoldenError

NUMBER = r"([0-9.]+(?:e-?[0-9]+)?)"


@dataclass(frozen=True)
class GradientRule:
    """Numbers of the file's ``grad_rule`` sentence.

    Attributes:
        zero_share: a tensor whose largest entry is below this share of G counts as truly zero.
        zero_allowed: share of G such a tensor may reach.
        norm_rtol: relative tolerance of norms.
        step_floor: root-mean-square gradient below which an optimiser step is not compared.
    """

    zero_share: float
    zero_allowed: float
    norm_rtol: float
    step_floor: float


def parse_gradient_rule(text: str) -> GradientRule:
    """Read the four numbers out of the rule sentence.

    Args:
        text: the sentence of ``index.json``.

    Raises:
        GoldenError: if a number is not where the sentence is known to state it.
    """
    patterns = (
        rf"max\|b\| < {NUMBER}\*G",
        rf"\|a\| <= {NUMBER}\*G",
        rf"norms use rtol {NUMBER}",
        rf"sqrt\(n\) >= {NUMBER}",
    )
    found = [re.search(pattern, text) for pattern in patterns]
    if not all(found):
        raise GoldenError(f"grad_rule not understood: {text[:80]!r}")
    return GradientRule(*(float(match.group(1)) for match in found if match))


def exact_ratio(computed: Any, stored: Any) -> float:
    """0 when equal, infinity otherwise; for integers, masks and texts."""
    if isinstance(stored, torch.Tensor):
        same = isinstance(computed, torch.Tensor) and computed.shape == stored.shape
        return 0.0 if same and torch.equal(computed.to(stored.dtype), stored) else math.inf
    return 0.0 if computed == stored else math.inf


def output_ratio(computed: torch.Tensor, stored: torch.Tensor, rtol: float, atol: float) -> float:
    """Largest |a - b| / (atol + rtol |b|), per element; infinity for another shape or a non-finite value."""
    if computed.shape != stored.shape or not torch.isfinite(computed).all():
        return math.inf
    if not stored.dtype.is_floating_point:
        return exact_ratio(computed, stored)
    difference = (computed.double() - stored.double()).abs()
    allowed = (atol + rtol * stored.double().abs()).clamp_min(torch.finfo(torch.float64).tiny)
    return float((difference / allowed).max()) if stored.numel() else 0.0


def gradient_ratio(
    computed: torch.Tensor, stored: torch.Tensor, rtol: float, atol: float, largest: float, rule: GradientRule
) -> float:
    """Error over allowed by the gradient rule: relative to the tensor's largest entry, or to G for true zeros.

    Args:
        computed: gradient of the shipped module; None counts as zeros.
        stored: recorded gradient.
        rtol: relative tolerance.
        atol: absolute tolerance.
        largest: G, the largest absolute gradient entry of the file.
        rule: numbers of the rule.
    """
    if computed.shape != stored.shape or not torch.isfinite(computed).all():
        return math.inf
    peak = float(stored.abs().max()) if stored.numel() else 0.0
    if peak < rule.zero_share * largest:
        return float(computed.abs().max()) / (rule.zero_allowed * largest)
    return float((computed.double() - stored.double()).abs().max()) / (atol + rtol * peak)


def reduce_like(name: str, value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Bring a full value to the form it was stored in.

    The format stores large tensors as a strided sample (stride = full size / stored size per axis), as an L2 norm,
    or as mean and standard deviation.

    Args:
        name: the form, as the stored name's last words state it.
        value: full tensor.
        stored: what it is compared with, for the target shape.
    """
    if name == "l2":
        return value.norm()
    if name == "mean_std":
        return torch.stack([value.mean(), value.std()])
    if value.dim() == stored.dim() and value.shape != stored.shape:
        strides = [full // kept if kept else 1 for full, kept in zip(value.shape, stored.shape, strict=True)]
        return value[tuple(slice(None, None, max(stride, 1)) for stride in strides)]
    return value
