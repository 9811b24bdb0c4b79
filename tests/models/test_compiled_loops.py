"""Compiled loops give what the plain functions give, and run without the compiler too."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from mg3d.models.vision_encoders.compiled import WithoutInterpreterLock


def running_sum(values: Tensor, target: Tensor, step: int) -> None:
    """Write sums of ``step`` values each."""
    for start in range(0, values.size(0), step):
        target[start // step] = values[start : start + step].sum()


def sums(function: WithoutInterpreterLock) -> list[float]:
    target = torch.zeros(3)
    function(torch.arange(8.0), target, step=3)
    return target.tolist()


def test_it_computes_the_same_without_a_word() -> None:
    loop = WithoutInterpreterLock(running_sum)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sums(loop) == [3.0, 12.0, 13.0]
    assert isinstance(loop.compiled, torch.jit.ScriptFunction)
    assert loop.__doc__ == running_sum.__doc__


def test_without_a_compiler_the_plain_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit, "script")
    loop = WithoutInterpreterLock(running_sum)
    assert sums(loop) == [3.0, 12.0, 13.0]
    assert loop.compiled is running_sum


def test_only_work_on_a_cpu_is_compiled() -> None:
    loop = WithoutInterpreterLock(running_sum)
    loop(torch.zeros(4, device="meta"), torch.zeros(2, device="meta"), 2)
    assert "compiled" not in vars(loop)
