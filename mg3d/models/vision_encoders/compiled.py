"""Loops of tensor operations that run without the lock of the Python interpreter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


class WithoutInterpreterLock(Generic[Inputs, Output]):
    """A function compiled by TorchScript at its first call on a CPU; elsewhere the plain function.

    Threads that call many small operations wait for each other at every one, as each of them takes and returns the
    interpreter's lock: a tenth of the time of the encoder with two threads. A compiled loop takes it once. Where a
    later PyTorch has no TorchScript any more (it calls it deprecated), the plain function runs with the same results.

    Args:
        function: its first argument is a tensor; annotated, and within what TorchScript understands.
    """

    def __init__(self, function: Callable[Inputs, Output]) -> None:
        self.function = function
        update_wrapper(self, function)

    @cached_property
    def compiled(self) -> Callable[Inputs, Output]:
        """The compiled function, or the plain one where there is no compiler."""
        compiler: Any = getattr(torch.jit, "script", None)
        if compiler is None:
            return self.function
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return compiler(self.function)

    def __call__(self, *arguments: Inputs.args, **options: Inputs.kwargs) -> Output:
        """Call the function."""
        first: Any = arguments[0]
        call = self.compiled if first.device.type == "cpu" else self.function
        return call(*arguments, **options)
