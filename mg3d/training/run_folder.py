"""The folder of one run: a fresh ``version_k`` each time, JSON written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mg3d.atomic import write_text_atomically
from mg3d.errors import EnvironmentProblem, OutputError
from mg3d.locks import FileLock

__all__ = [
    "CHECKPOINTS",
    "create_run_folder",
    "plain",
    "refuse_living_run",
    "run_lock",
    "run_name",
    "versions",
    "write_json",
]

VERSION_PATTERN = re.compile(r"version_(\d+)")
CHECKPOINTS = "checkpoints"
LOCK = ".lock"


def plain(value: Any) -> Any:
    """Turn a config value into what JSON and a safe checkpoint can hold (dict, list, str, number, bool, None)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and getattr(value, "size", None) == 1:
        return value.item()
    return str(value)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` (made plain first) as indented JSON, atomically."""
    write_text_atomically(path, json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n")


def run_name(exp_name: str, seed: int, load_path: str) -> str:
    """Published name of a run: ``{exp_name}-seed{seed}-from_{stem of load_path}``."""
    return f"{exp_name}-seed{seed}-from_{Path(load_path).stem if load_path else ''}"


def versions(experiment: Path) -> list[tuple[int, Path]]:
    """Version folders of an experiment, newest number first."""
    if not experiment.is_dir():
        return []
    found = ((VERSION_PATTERN.fullmatch(entry.name), entry) for entry in experiment.iterdir() if entry.is_dir())
    return sorted(((int(match[1]), entry) for match, entry in found if match), reverse=True)


def _numbers(experiment: Path) -> Iterator[int]:
    known = versions(experiment)
    number = known[0][0] + 1 if known else 0
    while True:
        yield number
        number += 1


def create_run_folder(log_dir: str | Path, exp_name: str, seed: int, load_path: str = "") -> Path:
    """Make the next ``log_dir/{run name}/version_k``; no run ever writes into the folder of another.

    ``mkdir`` without ``exist_ok`` is the lock: of two runs that start in the same instant one takes the next number.
    A resumed run gets a new version as well and records where it came from.

    Raises:
        EnvironmentProblem: the place cannot be written.
    """
    experiment = Path(log_dir).expanduser() / run_name(exp_name, seed, load_path)
    try:
        experiment.mkdir(parents=True, exist_ok=True)
        for number in _numbers(experiment):
            with contextlib.suppress(FileExistsError):
                folder = experiment / f"version_{number}"
                folder.mkdir()
                (folder / CHECKPOINTS).mkdir()
                return folder
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot make a run folder in {experiment}: {error.strerror}",
            "give log_dir= a folder that can be written and has free space",
        ) from error
    raise EnvironmentProblem(f"no number is left for a run folder in {experiment}", "give another log_dir=")


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Mark a run folder as being written while the block runs; a process that dies gives the mark back."""
    lock = FileLock(run_dir / LOCK)
    try:
        taken = lock.acquire()
    except OSError as error:
        raise OutputError(
            run_dir, error.strerror or str(error), "give log_dir= a folder that can be written"
        ) from error
    if not taken:
        raise _busy(run_dir, lock)
    lock.sign()
    try:
        yield
    finally:
        lock.release()


def refuse_living_run(folders: Sequence[Path]) -> None:
    """Refuse to go on from a run that another process still writes.

    Args:
        folders: run or checkpoint folders, the newest run first; those older than the first with a checkpoint are
            not asked.

    Raises:
        EnvironmentProblem: one is being written, with host and process of the writer.
    """
    for folder in folders:
        run_dir = folder.parent if folder.name == CHECKPOINTS else folder
        lock = FileLock(run_dir / LOCK)
        if lock.is_held():
            raise _busy(run_dir, lock)
        if any(folder.glob("*.ckpt")):
            return


def _busy(run_dir: Path, lock: FileLock) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{run_dir} is being written by {lock.owner()}",
        "wait for it or stop it, then resume; to branch off meanwhile, name one of its checkpoint files",
    )
