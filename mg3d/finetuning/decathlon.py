"""Lists of cases in the json form of the Medical Segmentation Decathlon: ``training``, ``validation``, ``test``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Case, Splits
from mg3d.finetuning.splits import leakage_report

__all__ = ["Listing", "listed_splits", "read_listing"]


@dataclass(frozen=True)
class Listing:
    """File names without their folders; a part that the json does not have is empty.

    Attributes:
        training: (image, label) pairs.
        validation: (image, label) pairs.
        test: images.
        announced: number of training pairs that the json claims; None where it does not.
    """

    training: tuple[tuple[str, str], ...]
    validation: tuple[tuple[str, str], ...]
    test: tuple[str, ...]
    announced: int | None = None


def read_listing(path: Path) -> Listing:
    """Read a Decathlon json.

    Raises:
        DataError: no such file, no JSON, or not of this form.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pairs = {
            part: tuple((Path(entry["image"]).name, Path(entry["label"]).name) for entry in content.get(part, ()))
            for part in ("training", "validation")
        }
        test = tuple(Path(entry).name for entry in content.get("test", ()))
        announced = None if content.get("numTraining") is None else int(content["numTraining"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"cannot be read as a Decathlon list ({error!r})", "give the published json", path=str(path)
        ) from error
    return Listing(pairs["training"], pairs["validation"], test, announced)


def listed_splits(path: Path, cases: Sequence[Case]) -> Splits:
    """The published lists of training and validation images; validation both selects and is reported.

    Args:
        path: a Decathlon json.
        cases: all cases; those the json does not name are left out.

    Returns:
        the splits, with a note on what both parts share.

    Raises:
        DataError: the json cannot be read, holds no validation list, or names images that are not there.
    """
    listing = read_listing(path)
    by_name = {case.image.name: case for case in cases}
    absent = [name for name, _ in (*listing.training, *listing.validation) if name not in by_name]
    if absent or not listing.validation:
        what = f"{len(absent)} images are not there, first {absent[0]}" if absent else "no validation list"
        raise DataError(what, "give the json that belongs to this data set", path=str(path))
    train, val = (tuple(by_name[name] for name, _ in part) for part in (listing.training, listing.validation))
    chosen = Splits(train, val, val)
    return replace(chosen, notes=leakage_report(chosen))
