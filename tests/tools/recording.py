"""Write a directory of recorded values as ``tools/check_golden.py`` reads it, and spoil one value of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
GRADIENT_RULE = (
    "per tensor: |a-b| <= atol + rtol*max|b|; a tensor whose max|b| < 1e-6*G needs only |a| <= 1e-4*G; delta_l2 where "
    "grad_l2/sqrt(n) >= 1e-6; norms use rtol 2e-3."
)
INPUT_PARTS = ("in.", "in1.", "in2.", "state.", "cot.", "init.")

Tensors = dict[str, Tensor]
Function = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensors]


@dataclass
class Recording:
    """One entry to be written.

    Attributes:
        name: entry name.
        family: family name.
        tensors: values of a safetensors entry.
        body: values of a JSON entry.
        results: names or JSON paths of stored results; None = every tensor whose name does not say it is an input.
        parts: number of files the tensors are spread over.
    """

    name: str
    family: str
    tensors: Tensors = field(default_factory=dict)
    body: Any = None
    role: str = "io"
    uses: Sequence[str] = ()
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, float] | None = None
    results: Sequence[str] | None = None
    parts: int = 1

    def spoilable(self) -> list[str]:
        """Results of which 1 % is more than the tolerance."""
        limits = self.tolerance or TOLERANCE
        share = 0.009 - limits["rtol"]
        names = self.result_names()
        if self.body is not None:
            return names
        return [
            name
            for name in names
            if not self.tensors[name].is_floating_point() or self.tensors[name].abs().max() * share > limits["atol"]
        ]

    def result_names(self) -> list[str]:
        """Names of what was computed rather than given."""
        if self.results is not None:
            return list(self.results)
        if self.role != "io":
            return []
        return [name for name in self.tensors if not any(f".{part}" in f".{name}" for part in INPUT_PARTS)]


class Draws:
    """Seeded random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values."""
        return torch.randn(shape, generator=self.generator) * scale

    def grey(self, *shape: int) -> Tensor:
        """8-bit grey values."""
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def state(self, shapes: Mapping[str, Sequence[int]]) -> Tensors:
        """Weights of the given shapes, about 1 / sqrt(fan-in)."""
        return {name: self.normal(*shape, scale=math.prod(shape[1:]) ** -0.5) for name, shape in shapes.items()}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under ``prefix`` + name."""
    return {prefix + name: value for name, value in tensors.items()}


def differentiated(
    draws: Draws,
    function: Function,
    state: Tensors,
    inputs: Tensors,
    seeds: Sequence[str] | None = None,
) -> tuple[Tensors, list[str]]:
    """Evaluate an independent formula and its gradients in float64, stored as float32.

    Args:
        draws: source of the cotangents.
        function: (state, inputs) -> outputs.
        state: parameters.
        inputs: inputs; integer ones get no gradient.
        seeds: outputs that get a cotangent; None = all.

    Returns:
        All tensors in the stored layout, and the names of parameters that take no part.
    """
    state, inputs = precise_leaves(state), precise_leaves(inputs)
    outputs = function(state, inputs)
    chosen = [name for name in outputs if seeds is None or name in seeds]
    cotangents = {name: draws.normal(*outputs[name].shape) for name in chosen}
    leaves = {f"in.{name}": value for name, value in inputs.items() if value.requires_grad}
    leaves |= {f"param.{name}": value for name, value in state.items() if value.requires_grad}
    scalar = sum((outputs[name] * cotangents[name]).sum() for name in chosen)
    found = dict(zip(leaves, torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True), strict=True))
    tensors = prefixed("state.", state) | prefixed("in.", inputs) | prefixed("out.", outputs)
    tensors |= prefixed("cot.", cotangents)
    tensors |= {f"grad.{name}": value for name, value in found.items() if value is not None}
    silent = [name.removeprefix("param.") for name, value in found.items() if value is None]
    return stored_precision(tensors), silent


def precise_leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    """Float64 leaves that collect a gradient; integers as they are."""
    return {
        name: value.double().requires_grad_() if value.is_floating_point() else value for name, value in tensors.items()
    }


def stored_precision(tensors: Mapping[str, Tensor]) -> Tensors:
    """Detached, float32 instead of float64."""
    return {
        name: value.detach().float() if value.is_floating_point() else value.detach() for name, value in tensors.items()
    }


def sampled(tensors: Tensors, forms: Mapping[str, Sequence[Any]]) -> Tensors:
    """Replace whole tensors by reduced forms.

    Args:
        tensors: stored values.
        forms: name -> forms: a stride per axis (as a tuple), ``"l2"`` or ``"mean_std"``.
    """
    kept = {name: value for name, value in tensors.items() if name not in forms}
    for name, wanted in forms.items():
        value = tensors[name]
        for form in wanted:
            if form == "l2":
                kept[f"{name}_l2"] = value.norm()
            elif form == "mean_std":
                kept[f"{name}_mean_std"] = torch.stack([value.mean(), value.std()])
            else:
                kept[f"{name}_slice"] = value[tuple(slice(None, None, step) for step in form)]
    return kept


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_files(folder: Path, number: int, recording: Recording) -> list[str]:
    if recording.body is not None:
        name = f"values{number}.json"
        (folder / name).write_text(json.dumps(recording.body), encoding="utf-8")
        return [name]
    names = list(recording.tensors)
    files = []
    for part in range(recording.parts):
        files.append(f"values{number}.part{part}.safetensors")
        chosen = {name: recording.tensors[name].contiguous() for name in names[part :: recording.parts]}
        save_file(chosen, str(folder / files[-1]))
    return files


def write_directory(folder: Path, recordings: Sequence[Recording], **top: Any) -> None:
    """Write the files and the index of some recordings; ``top`` replaces top-level keys of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, each in enumerate(recordings):
        files = _write_files(folder, number, each)
        shapes = {name: {"shape": list(value.shape)} for name, value in each.tensors.items()}
        plain = {key: getattr(each, key) for key in ("name", "family", "role", "config", "options", "tolerance")}
        digests = [_digest(folder / name) for name in files]
        entries.append(plain | {"uses": list(each.uses), "files": files, "sha256": digests, "tensors": shapes})
    index = {"tolerance_default": TOLERANCE, "grad_rule": GRADIENT_RULE, "entries": entries} | top
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply a change to the parsed index and refresh every digest that still has a file."""
    path = folder / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index)
    path.write_text(json.dumps(index), encoding="utf-8")


def rehash(folder: Path, name: str) -> None:
    """Put the true digests of one entry's files into the index."""

    def refresh(index: dict[str, Any]) -> None:
        entry = next(entry for entry in index["entries"] if entry["name"] == name)
        entry["sha256"] = [_digest(folder / file) for file in entry["files"]]

    edit_index(folder, refresh)


def add_tensor(folder: Path, file: str, name: str, value: Tensor) -> None:
    """Write one more tensor into a stored file."""
    save_file(load_file(str(folder / file)) | {name: value}, str(folder / file))


def spoiled_tensor(value: Tensor) -> Tensor:
    """The value with its largest entry 1 % off, or one integer off by one."""
    flat = value.clone().flatten()
    if value.is_floating_point():
        flat[flat.abs().argmax()] *= 1.01
    else:
        flat[0] = flat[0] == 0 if value.dtype == torch.bool else flat[0] ^ 1
    return flat.view(value.shape)


def _spoiled_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_spoiled_json(value[0]), *value[1:]] if value else [0]
    if isinstance(value, str):
        return f"{value}."
    return value * 1.01 if isinstance(value, float) else value + 1


def spoil(recording: Recording, name: str) -> Recording:
    """The recording with one stored result wrong: floats by 1 %, integers by one, texts by a character."""
    if recording.body is None:
        return replace(recording, tensors=recording.tensors | {name: spoiled_tensor(recording.tensors[name])})
    wrong = replace(recording, body=json.loads(json.dumps(recording.body)))
    *parents, last = name.split("/")
    holder = wrong.body
    for key in parents:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    place = int(last) if isinstance(holder, list) else last
    holder[place] = _spoiled_json(holder[place])
    return wrong
