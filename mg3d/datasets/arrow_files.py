"""Which Arrow files belong to a corpus and a split: one file, or numbered shards of which none may be missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from mg3d.errors import DataError
from mg3d.paths import visible_files

_SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})\.arrow$")


def find_arrow_files(data_root: str | Path, corpus: str, split: str) -> list[Path]:
    """Return the files of one corpus and split in order.

    Args:
        data_root: folder with the packed files.
        corpus: dataset key, for example ``clm_ct_rate``.
        split: train, val or test.

    Raises:
        DataError: nothing found, a shard is missing, or two sets of files compete.
    """
    root = Path(data_root).expanduser()
    stem = f"{corpus}_{split}"
    single = root / f"{stem}.arrow"
    shards = sorted(path for path in root.glob(f"{stem}-*-of-*.arrow") if _SHARD.search(path.name))
    if single.is_file() and shards:
        raise DataError(f"both {single.name} and {len(shards)} shards exist", "keep one of the two", path=str(root))
    if single.is_file():
        return [single]
    if not shards:
        raise DataError(
            f"expected {single.name} (or shards {stem}-00000-of-000NN.arrow) in {root}, found {_present(root)}",
            "pack the data with prepro/prepro_pretraining_data.py, or give data_root and datasets that match",
        )
    _check_shards(root, stem, shards)
    return shards


def _check_shards(root: Path, stem: str, shards: list[Path]) -> None:
    numbers = [tuple(int(part) for part in match.groups()) for path in shards if (match := _SHARD.search(path.name))]
    totals = {total for _, total in numbers}
    if len(totals) > 1:
        raise DataError(f"shards of {stem} with different totals {sorted(totals)}", "keep one set", path=str(root))
    total = totals.pop()
    missing = sorted(set(range(total)) - {number for number, _ in numbers})
    if missing:
        names = ", ".join(f"{stem}-{number:05d}-of-{total:05d}.arrow" for number in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"missing shard {names}{more}", "pack or copy the missing shards again", path=str(root))


def _present(root: Path) -> str:
    if not root.is_dir():
        return "no such folder"
    names = [path.name for path in visible_files(root, "*.arrow")]
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "no .arrow file"
