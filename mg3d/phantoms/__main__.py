"""Write a phantom study set: ``python -m mg3d.phantoms --out data/phantom``.

Makes ``OUT/ct_rate`` and ``OUT/ctrg`` in the published layouts and ``OUT/text_encoder``, a small BERT for their words.
The folder appears when everything is written; a finished one with the same settings is left alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mg3d.atomic import atomic_folder
from mg3d.command_line import exit_code_of
from mg3d.errors import DataError
from mg3d.locks import exclusive_output
from mg3d.phantoms import ct_rate_layout, ctrg_layout
from mg3d.phantoms.studies import Study, plan_studies
from mg3d.phantoms.text_encoder import write_text_encoder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK = 16


def write_phantoms(out: Path, *, train: int, test: int, ctrg: int, size: int, seed: int, workers: int = 1) -> bool:
    """Write the study set, or find it complete.

    Args:
        out: target folder.
        train: CT-RATE scans for training.
        test: CT-RATE scans of the official validation split, other patients.
        ctrg: CTRG studies.
        size: voxels per axis, at least 32.
        seed: seed of everything.
        workers: processes.

    Returns:
        True if it was written, False if it was there.

    Raises:
        DataError: the folder holds something else.
        EnvironmentProblem: another process writes it, or the place cannot be written.
        OutputError: the disk is full.
    """
    settings = {
        "format_version": FORMAT_VERSION,
        "train": train,
        "test": test,
        "ctrg": ctrg,
        "size": size,
        "seed": seed,
    }
    if _is_complete(out, settings):
        return False
    with exclusive_output(out):
        if _is_complete(out, settings):  # another process has just finished it
            return False
        with atomic_folder(out) as staging:
            _write_all(staging, settings, workers)
    return True


def _is_complete(out: Path, settings: dict[str, int]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError("exists and is no phantom set", "name another --out", path=str(out)) from None
    if found.get("settings") != settings:
        raise DataError("holds a phantom set of other settings", "remove it or name another --out", path=str(out))
    return True


def _write_all(folder: Path, settings: dict[str, int], workers: int) -> None:
    size, seed = settings["size"], settings["seed"]
    studies = {
        split: list(plan_studies(split, settings[key], size, seed))
        for split, key in (("train", "train"), ("valid", "test"), ("ctrg", "ctrg"))
    }
    ct_rate, ctrg = folder / "ct_rate", folder / "ctrg"
    for split in ("train", "valid"):
        ct_rate_layout.write_tables(ct_rate, split, studies[split])
        _run(functools.partial(ct_rate_layout.write_volumes, ct_rate, split), studies[split], workers)
    ctrg_layout.write_annotation(ctrg, studies["ctrg"])
    _run(functools.partial(ctrg_layout.write_slices, ctrg), studies["ctrg"], workers)
    texts = [f"{study.report.findings} {study.report.impression}" for study in studies["train"] + studies["ctrg"]]
    write_text_encoder(folder / "text_encoder", texts, seed)
    counts = {split: sum(len(study.grids) for study in group) for split, group in studies.items()}
    manifest = {"settings": settings, "volumes": counts, "note": "drawn by a program; no patient data"}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _run(write: Callable[[Study], None], studies: list[Study], workers: int) -> None:
    if workers <= 1 or len(studies) <= _CHUNK:
        for study in studies:
            write(study)
        return
    with ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(write, studies, chunksize=_CHUNK):
            pass


def _at_least(smallest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise ValueError
        return value

    number.__name__ = f"integer of at least {smallest}"
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command line; the defaults are those of the demo."""
    parser = argparse.ArgumentParser(prog="python -m mg3d.phantoms", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="target folder")
    parser.add_argument("--train", type=_at_least(1), default=960, help="CT-RATE training scans (%(default)s)")
    parser.add_argument("--test", type=_at_least(1), default=256, help="CT-RATE held-out scans (%(default)s)")
    parser.add_argument("--ctrg", type=_at_least(1), default=40, help="CTRG studies (%(default)s)")
    parser.add_argument("--size", type=_at_least(32), default=48, help="voxels per axis (%(default)s)")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="seed of everything (%(default)s)")
    parser.add_argument("--workers", type=_at_least(0), default=0, help="processes; 0: one per core, at most 8")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code (0 fine, 1 the disk refused, 2 bad input)."""
    options = build_parser().parse_args(arguments)
    workers = options.workers or min(os.cpu_count() or 1, 8)
    sizes = {key: getattr(options, key) for key in ("train", "test", "ctrg", "size", "seed")}

    def work() -> int:
        written = write_phantoms(options.out, **sizes, workers=workers)
        sys.stdout.write(f"{options.out}: {'written' if written else 'already complete'}\n")
        return 0

    remedy = "check space and permissions of --out"
    return exit_code_of(work, disk_code=1, disk_remedy=remedy, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
