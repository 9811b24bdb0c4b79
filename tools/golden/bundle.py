"""The files of one run as an adapter sees them, with a record of what was read and what was compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tools.golden.compare import gradient_ratio, json_ratio, output_ratio, parse_gradient_rule, reduce_like
from tools.golden.index import Entry, GoldenError, json_leaves
from tools.golden.measure import root_mean_square

FORMS = ("slice", "l2", "mean_std")
OUTPUTS = ("out.", "grad.", "loss.")
"""Prefixes of names that hold results: reading such a tensor does not count, it has to be compared."""


@dataclass
class Tally:
    """What happened to the values of one entry."""

    read: set[str] = field(default_factory=set)
    compared: dict[str, float] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)


def value_at(body: Any, path: str) -> Any:
    """The part of a JSON body at keys and positions joined by slashes."""
    for key in path.split("/"):
        body = body[int(key)] if isinstance(body, list) else body[key]
    return body


class Bundle:
    """Entries of one run. Adapters read inputs and state from it and hand computed values back by name.

    Args:
        entries: the entry itself and its partners.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.tallies = {entry.name: Tally() for entry in entries}
        self.config: dict[str, Any] = {key: value for entry in entries for key, value in entry.config.items()}
        self.options: dict[str, Any] = {key: value for entry in entries for key, value in entry.options.items()}

    def _find(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if name in entry.tensors), None)

    def has(self, name: str) -> bool:
        """Whether a tensor of that name is stored."""
        return self._find(name) is not None

    def peek(self, name: str) -> torch.Tensor:
        """A stored output, without counting it as read; for its shape or to recognise how it was recorded."""
        entry = self._find(name)
        if entry is None:
            raise GoldenError(f"{self.entries[0].name}: tensor {name} is not stored")
        return entry.tensors[name]

    def names(self, prefix: str = "") -> list[str]:
        """Stored tensor names that start with ``prefix``, in file order."""
        return [name for entry in self.entries for name in entry.tensors if name.startswith(prefix)]

    def read(self, name: str) -> torch.Tensor:
        """A stored input; raises GoldenError when it is not there."""
        entry = self._find(name)
        if entry is None:
            raise GoldenError(f"{self.entries[0].name}: tensor {name} is not stored")
        self.tallies[entry.name].read.add(name)
        return entry.tensors[name]

    def read_all(self, prefix: str) -> dict[str, torch.Tensor]:
        """Stored tensors under a prefix, which is stripped from their names."""
        return {name.removeprefix(prefix): self.read(name) for name in self.names(prefix)}

    def state(self, prefix: str = "state.") -> dict[str, torch.Tensor]:
        """State dict of the module: the tensors of the state entry, or those under ``prefix``."""
        bare = [entry for entry in self.entries if entry.role == "state"]
        if bare:
            return {name: self.read(name) for entry in bare for name in entry.tensors}
        return self.read_all(prefix)

    def cotangents(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stored cotangents of those outputs that have one."""
        return {name: self.read(f"cot.{name}") for name in outputs if self.has(f"cot.{name}")}

    def bodies(self) -> list[Entry]:
        """Entries that are JSON files."""
        return [entry for entry in self.entries if entry.body is not None]

    def read_json(self, entry: Entry, *paths: str) -> None:
        """Mark JSON values (and all below them) as inputs."""
        tally = self.tallies[entry.name]
        for leaf, _ in json_leaves(entry.body):
            if any(leaf == path or leaf.startswith(f"{path}/") for path in paths):
                tally.read.add(leaf)

    def check(self, name: str, value: torch.Tensor, *, gradient: bool = False) -> None:
        """Compare a computed tensor with the stored one of that name, or with its stored sample, norm or moments."""
        value = value.detach()
        for stored_name in [name, *(f"{name}_{form}" for form in FORMS)]:
            entry = self._find(stored_name)
            if entry is not None:
                form = stored_name.removeprefix(name).lstrip("_")
                self._compare(entry, stored_name, form, value, gradient)

    def _compare(self, entry: Entry, name: str, form: str, value: torch.Tensor, gradient: bool) -> None:
        stored = entry.tensors[name]
        reduced = reduce_like(form, value, stored)
        rtol, atol = entry.tolerance["rtol"], entry.tolerance["atol"]
        if not gradient:
            ratio = output_ratio(reduced, stored, rtol, atol)
        else:
            rule = parse_gradient_rule(entry.grad_rule)
            rtol = max(rtol, rule.norm_rtol) if form == "l2" else rtol
            ratio = gradient_ratio(reduced, stored, rtol, atol, self.largest_gradient(entry), rule)
        self.tallies[entry.name].compared[name] = ratio

    def check_norms(self, name: str, values: torch.Tensor) -> None:
        """Compare a stored vector of gradient norms."""
        entry = self._find(name)
        if entry is None:
            return
        rule = parse_gradient_rule(entry.grad_rule)
        stored, largest = entry.tensors[name], self.largest_gradient(entry)
        rtol = max(entry.tolerance["rtol"], rule.norm_rtol)
        ratios = [
            gradient_ratio(mine, theirs, rtol, entry.tolerance["atol"], largest, rule)
            for mine, theirs in zip(values, stored, strict=True)
        ]
        self.tallies[entry.name].compared[name] = max(ratios, default=math.inf)

    @staticmethod
    def largest_gradient(entry: Entry) -> float:
        """G of the gradient rule: the largest absolute gradient entry of the file."""
        peaks = [float(t.abs().max()) for n, t in entry.tensors.items() if ".grad." in f".{n}" and t.numel()]
        return max(peaks, default=0.0)

    def check_json(
        self, entry: Entry, path: str, value: Any, *, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Compare a computed value with the JSON value at ``path``: numbers by tolerance, all else exactly.

        Args:
            entry: the JSON entry.
            path: keys and positions joined by slashes.
            value: computed counterpart (same nesting).
            rtol: relative tolerance instead of the entry's.
            atol: absolute tolerance instead of the entry's.
        """
        mine = dict(json_leaves(value, path))
        stored = {leaf: item for leaf, item in json_leaves(entry.body) if leaf == path or leaf.startswith(f"{path}/")}
        tally = self.tallies[entry.name]
        if set(mine) != set(stored):
            tally.compared.update(dict.fromkeys(stored or {path: None}, math.inf))
            return
        relative = entry.tolerance["rtol"] if rtol is None else rtol
        absolute = entry.tolerance["atol"] if atol is None else atol
        for leaf, item in stored.items():
            tally.compared[leaf] = json_ratio(mine[leaf], item, relative, absolute)

    def check_rates(self, entry: Entry, path: str, base_lr: float, factor: float) -> None:
        """Compare the learning rates of a schedule row: ``lr_base``, and ``lr_x<multiplier>`` for faster groups."""
        for leaf, _ in list(json_leaves(entry.body)):
            column = leaf.removeprefix(f"{path}/lr_")
            if column != leaf:
                multiplier = 1.0 if column == "base" else float(column.removeprefix("x"))
                self.check_json(entry, leaf, base_lr * multiplier * factor, atol=0.0)

    def check_json_norms(self, entry: Entry, path: str, norms: Mapping[str, float]) -> None:
        """Compare stored gradient norms by parameter name; a computed zero may be left out of ``norms``."""
        rule = parse_gradient_rule(entry.grad_rule)
        stored = dict(json_leaves(value_at(entry.body, path), path))
        largest = max(stored.values(), default=0.0)
        for leaf, value in stored.items():
            mine = torch.tensor(norms.get(leaf.removeprefix(f"{path}/"), 0.0))
            tolerance = (rule.norm_rtol, entry.tolerance["atol"], largest, rule)
            self.tallies[entry.name].compared[leaf] = gradient_ratio(mine, torch.tensor(value), *tolerance)

    def check_json_steps(
        self,
        entry: Entry,
        path: str,
        ranges: Mapping[str, tuple[float, float]],
        gradients: str,
        sizes: Mapping[str, int],
    ) -> None:
        """Compare the norms of one optimiser step where the gradient is large enough for the rule.

        Args:
            entry: the JSON entry.
            path: where the stored norms are.
            ranges: parameter name -> lowest and highest norm of its change; the stored one must lie between them.
            gradients: where the norms of the gradients are.
            sizes: parameter name -> number of its entries.
        """
        rule = parse_gradient_rule(entry.grad_rule)
        norms = value_at(entry.body, gradients)
        for name, stored in value_at(entry.body, path).items():
            leaf = f"{path}/{name}"
            if root_mean_square(norms.get(name, 0.0), sizes.get(name, 1)) < rule.step_floor:
                self.excuse_json(entry, leaf)
                continue
            lowest, highest = ranges.get(name, (math.inf, math.inf))
            known = math.isfinite(lowest) and math.isfinite(highest)
            nearest = min(max(stored, lowest), highest) if known else math.inf
            self.check_json(entry, leaf, nearest, rtol=rule.norm_rtol)

    def step_floor(self, entry: Entry) -> float:
        """Gradient entry below which the file's rule takes an optimiser step as undetermined."""
        return parse_gradient_rule(entry.grad_rule).step_floor

    def excuse_json(self, entry: Entry, path: str) -> None:
        """Mark a JSON value the file's own rule says is not to be compared."""
        self.tallies[entry.name].excused.add(path)

    def outcome(self, entry: Entry) -> tuple[int, list[str], float]:
        """Number compared, names never touched, and the largest error over allowed."""
        tally = self.tallies[entry.name]
        prefixes = OUTPUTS if entry.role != "state" else ()
        read = {name for name in tally.read if not name.startswith(prefixes)}
        untouched = [name for name in entry.value_names() if name not in read | tally.compared.keys() | tally.excused]
        return len(tally.compared), untouched, max(tally.compared.values(), default=0.0)
