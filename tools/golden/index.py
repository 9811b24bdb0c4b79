"""Reading a directory of recorded tensors: its index, its files and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class GoldenError(Exception):
    """The directory or one of its entries cannot be used; the message names it."""


def json_leaves(body: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar or list of scalars of a JSON body with its keys and positions joined by slashes."""
    if isinstance(body, dict) and body:
        for key, value in body.items():
            yield from json_leaves(value, f"{path}/{key}" if path else str(key))
    elif isinstance(body, list) and any(isinstance(item, (dict, list)) for item in body):
        for position, value in enumerate(body):
            yield from json_leaves(value, f"{path}/{position}" if path else str(position))
    else:
        yield path, body


@dataclass
class Entry:
    """One line of ``index.json`` with the content of its files.

    Attributes:
        name: name of the entry, used in messages only.
        role: ``state`` files hold bare state dicts; the others name the role of each tensor by a prefix.
        family: selects the adapter.
        uses: partners whose files belong to the same run.
        config: sizes and seeds the values were recorded with.
        options: settings to run with.
        tolerance: ``{"rtol", "atol"}``.
        grad_rule: text of the rule gradients are compared by.
        tensors: name -> tensor, for safetensors files.
        body: parsed JSON, for JSON files.
    """

    name: str
    role: str
    family: str
    uses: list[str]
    config: dict[str, Any]
    options: dict[str, Any]
    tolerance: dict[str, float]
    grad_rule: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    body: Any = None

    def value_names(self) -> list[str]:
        """Names of all tensors, or paths of all JSON values."""
        return [*self.tensors, *(leaf for leaf, _ in json_leaves(self.body) if self.body is not None)]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load_files(directory: Path, raw: dict[str, Any], entry: Entry) -> None:
    files, digests = raw["files"], raw["sha256"]
    if not files or len(files) != len(digests):
        raise GoldenError(f"{entry.name}: {len(files)} files but {len(digests)} sha256 in index.json")
    for name, expected in zip(files, digests, strict=True):
        path = (directory / name).resolve()
        if not path.is_relative_to(directory.resolve()) or not path.is_file():
            raise GoldenError(f"{entry.name}: file {name} is missing")
        if _digest(path) != expected:
            raise GoldenError(f"{entry.name}: {name} has another sha256 than index.json states")
        if path.suffix == ".json":
            entry.body = json.loads(path.read_text(encoding="utf-8"))
            continue
        part = load_file(str(path))
        if repeated := part.keys() & entry.tensors.keys():
            raise GoldenError(f"{entry.name}: tensor {min(repeated)} is in two files")
        entry.tensors.update(part)
    _check_declared(raw.get("tensors"), entry)


def _check_declared(declared: dict[str, Any] | None, entry: Entry) -> None:
    """The index lists what the files hold: names, and shapes where it gives them."""
    if declared is None:
        return
    if set(declared) != set(entry.tensors):
        raise GoldenError(f"{entry.name}: the tensors in the file are not those index.json lists")
    for name, tensor in entry.tensors.items():
        shape = declared[name].get("shape", list(tensor.shape))
        if list(tensor.shape) != shape:
            raise GoldenError(f"{entry.name}: tensor {name} has shape {list(tensor.shape)}, index.json states {shape}")


def _entry(raw: dict[str, Any], top: dict[str, Any]) -> Entry:
    own_rule = raw.get("grad_rule", "")
    return Entry(
        name=raw["name"],
        role=raw.get("role", "io"),
        family=raw.get("family", ""),
        uses=list(raw.get("uses", [])),
        config=raw.get("config", {}),
        options=raw.get("options", {}),
        tolerance=raw.get("tolerance") or top["tolerance_default"],
        grad_rule=own_rule if own_rule not in ("", "see top level") else top.get("grad_rule", ""),
    )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        top = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: no readable index ({error})") from error
    raws = top.get("entries") if isinstance(top, dict) else None
    if not raws or not all(isinstance(raw, dict) and "name" in raw for raw in raws):
        raise GoldenError(f"{path}: lists no entries, or one without a name")
    if len({raw["name"] for raw in raws}) != len(raws):
        raise GoldenError(f"{path}: names an entry twice")
    if "tolerance_default" not in top and not all(raw.get("tolerance") for raw in raws):
        raise GoldenError(f"{path}: an entry has no tolerance and the index no tolerance_default")
    return top


def load_directory(directory: Path) -> tuple[list[Entry], dict[str, str]]:
    """Read ``index.json`` and every file it names.

    Args:
        directory: folder with ``index.json``.

    Returns:
        The entries in file order and, by entry name, what was wrong with those that could not be read.

    Raises:
        GoldenError: if the index is missing, unreadable, empty, or names an entry twice.
    """
    top = _read_index(directory / "index.json")
    names = {raw["name"] for raw in top["entries"]}
    entries, broken = [], {}
    for raw in top["entries"]:
        entry = _entry(raw, top)
        try:
            _load_files(directory, raw, entry)
            missing = [partner for partner in entry.uses if partner not in names]
            if missing:
                raise GoldenError(f"{entry.name}: partner {missing[0]} is not in the index")
        except (GoldenError, OSError, ValueError, SafetensorError) as error:
            broken[entry.name] = str(error)
        except (KeyError, TypeError, AttributeError) as error:
            broken[entry.name] = f"{entry.name}: index.json lacks {error}"
        entries.append(entry)
    return entries, broken
