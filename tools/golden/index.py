"""Reading a directory of recorded tensors: its index, its files and their digests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class GoldenError(Exception):
    """The directory or one of its entries cannot be used; the message names it."""


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


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load_files(directory: Path, raw: dict[str, Any], entry: Entry) -> None:
    for name, expected in zip(raw["files"], raw["sha256"], strict=True):
        path = (directory / name).resolve()
        if not path.is_relative_to(directory.resolve()) or not path.is_file():
            raise GoldenError(f"{entry.name}: file {name} is missing")
        if _digest(path) != expected:
            raise GoldenError(f"{entry.name}: {name} has another sha256 than index.json states")
        if path.suffix == ".json":
            entry.body = json.loads(path.read_text(encoding="utf-8"))
        else:
            entry.tensors.update(load_file(str(path)))
    declared = raw.get("tensors")
    if declared is not None and set(declared) != set(entry.tensors):
        raise GoldenError(f"{entry.name}: the tensors in the file are not those index.json lists")


def _entry(raw: dict[str, Any], top: dict[str, Any]) -> Entry:
    own_rule = raw.get("grad_rule", "")
    return Entry(
        name=raw["name"],
        role=raw.get("role", "io"),
        family=raw["family"],
        uses=list(raw.get("uses", [])),
        config=raw.get("config", {}),
        options=raw.get("options", {}),
        tolerance=raw.get("tolerance") or top["tolerance_default"],
        grad_rule=own_rule if own_rule not in ("", "see top level") else top["grad_rule"],
    )


def load_directory(directory: Path) -> tuple[list[Entry], dict[str, str]]:
    """Read ``index.json`` and every file it names.

    Args:
        directory: folder with ``index.json``.

    Returns:
        The entries in file order and, by entry name, what was wrong with those that could not be read.

    Raises:
        GoldenError: if the index is missing, unreadable, empty, or names an entry twice.
    """
    path = directory / "index.json"
    try:
        top = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: no readable index ({error})") from error
    raws = top.get("entries", [])
    names = [raw["name"] for raw in raws]
    if not raws or len(set(names)) != len(names):
        raise GoldenError(f"{path}: {'names an entry twice' if raws else 'lists no entries'}")
    entries, broken = [], {}
    for raw in raws:
        entry = _entry(raw, top)
        try:
            _load_files(directory, raw, entry)
            missing = [partner for partner in entry.uses if partner not in names]
            if missing:
                raise GoldenError(f"{entry.name}: partner {missing[0]} is not in the index")
        except (GoldenError, OSError, ValueError, KeyError) as error:
            broken[entry.name] = str(error)
        entries.append(entry)
    return entries, broken
