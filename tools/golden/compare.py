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


def exact_ratio(computed: torch.Tensor, stored: torch.Tensor) -> float:
    """0 when equal, infinity otherwise; for integers and masks of any width."""
    same = computed.shape == stored.shape and torch.equal(computed.double(), stored.double())
    return 0.0 if same else math.inf


def json_ratio(computed: Any, stored: Any, rtol: float, atol: float) -> float:
    """Error over allowed of a JSON value: floats by tolerance, lists by their worst entry, all else exactly."""
    if isinstance(stored, list):
        if not isinstance(computed, (list, tuple)) or len(computed) != len(stored):
            return math.inf
        pairs = zip(computed, stored, strict=True)
        return max((json_ratio(mine, theirs, rtol, atol) for mine, theirs in pairs), default=0.0)
    if isinstance(stored, float) and isinstance(computed, (int, float)) and not isinstance(computed, bool):
        return _over(abs(computed - stored), atol + rtol * abs(stored))
    same_kind = isinstance(computed, bool) == isinstance(stored, bool)
    return 0.0 if same_kind and computed == stored else math.inf


def _over(error: float, allowed: float) -> float:
    """Error over allowed; infinity when anything is not finite, also where nothing is allowed."""
    if error == 0.0:
        return 0.0
    return error / allowed if allowed > 0.0 and math.isfinite(error) and math.isfinite(allowed) else math.inf


def output_ratio(computed: torch.Tensor, stored: torch.Tensor, rtol: float, atol: float) -> float:
    """Largest |a - b| / (atol + rtol |b|), per element; infinity for another shape or a non-finite value."""
    if not _comparable(computed, stored):
        return math.inf
    if not stored.dtype.is_floating_point:
        return exact_ratio(computed, stored)
    difference = (computed.double() - stored.double()).abs()
    allowed = (atol + rtol * stored.double().abs()).clamp_min(torch.finfo(torch.float64).tiny)
    return float((difference / allowed).max()) if stored.numel() else 0.0


def _comparable(computed: torch.Tensor, stored: torch.Tensor) -> bool:
    return computed.shape == stored.shape and bool(torch.isfinite(computed).all() and torch.isfinite(stored).all())


def gradient_ratio(
    computed: torch.Tensor, stored: torch.Tensor, rtol: float, atol: float, largest: float, rule: GradientRule
) -> float:
    """Error over allowed by the gradient rule: relative to the tensor's largest entry, or to G for true zeros.

    Args:
        computed: gradient of the shipped module.
        stored: recorded gradient.
        rtol: relative tolerance.
        atol: absolute tolerance.
        largest: G, the largest absolute gradient entry of the file.
        rule: numbers of the rule.
    """
    if not _comparable(computed, stored):
        return math.inf
    if not stored.numel():
        return 0.0
    peak = float(stored.abs().max())
    if peak < rule.zero_share * largest:
        return _over(float(computed.abs().max()), rule.zero_allowed * largest)
    return _over(float((computed.double() - stored.double()).abs().max()), atol + rtol * peak)


def reduce_like(form: str, value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Bring a full value to the form it was stored in.

    The format stores large tensors as a strided sample (stride = full size / stored size per axis, rounded up), as an
    L2 norm, or as mean and standard deviation.

    Args:
        form: the last words of the stored name: ``slice``, ``l2``, ``mean_std``, or nothing for the whole tensor.
        value: full tensor.
        stored: what it is compared with, for the target shape.
    """
    if form == "l2":
        return value.norm()
    if form == "mean_std":
        return torch.stack([value.mean(), value.std()])
    if form == "slice" and value.dim() == stored.dim():
        strides = [-(-full // max(kept, 1)) for full, kept in zip(value.shape, stored.shape, strict=True)]
        return value[tuple(slice(None, None, max(stride, 1)) for stride in strides)]
    return value
