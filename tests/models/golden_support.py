"""Comparison of a module with one entry of recorded tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def load_entry(golden_dir: Path, name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and index record of one entry."""
    records = json.loads((golden_dir / "index.json").read_text(encoding="utf-8"))["entries"]
    record = next(r for r in records if r["name"] == name)
    return load_file(golden_dir / f"{name}.safetensors"), record


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with ``prefix.``, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def check_outputs(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], record: dict) -> None:
    """Compare all expected outputs within the tolerance of the entry."""
    tolerance = record.get("tolerance", {"rtol": 1e-4, "atol": 1e-5})
    assert set(outputs) == set(expected)
    for name, want in expected.items():
        torch.testing.assert_close(outputs[name].detach(), want, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_gradients(gradients: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], record: dict) -> None:
    """Compare gradients by the rule of the index: relative to the largest entry, tiny true zeros apart."""
    tolerance = record.get("tolerance", {"rtol": 1e-4, "atol": 1e-5})
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, want in expected.items():
        got = gradients[name]
        assert got is not None, f"{name} received no gradient"
        peak = float(want.abs().max())
        if peak < 1e-6 * largest:
            assert float(got.abs().max()) <= 1e-5 * largest, name
        else:
            allowed = tolerance["atol"] + tolerance["rtol"] * peak
            assert float((got - want).abs().max()) <= allowed, name


def check_module(
    golden_dir: Path,
    name: str,
    build: Callable[[dict[str, Tensor], dict], nn.Module],
    call: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]],
) -> nn.Module:
    """Load the state strictly, run, and compare every output and gradient of the entry."""
    tensors, record = load_entry(golden_dir, name)
    module = build(tensors, record["config"]).eval()
    module.load_state_dict(under(tensors, "state"), strict=True)
    inputs = {k: v.requires_grad_(v.is_floating_point()) for k, v in under(tensors, "in").items()}
    outputs = call(module, inputs)
    check_outputs(outputs, under(tensors, "out"), record)
    cotangents = under(tensors, "cot")
    sum((outputs[key] * cotangent).sum() for key, cotangent in cotangents.items()).backward()
    gradients = {f"in.{k}": v.grad for k, v in inputs.items()}
    gradients |= {f"param.{k}": p.grad for k, p in module.named_parameters()}
    check_gradients(gradients, under(tensors, "grad"), record)
    for silent in record["config"].get("params_without_gradient", []):
        assert gradients[f"param.{silent}"] is None, f"{silent} should receive no gradient"
    return module
