"""Which runs a comparison is made of, what each is called, and what is already done of it. No heavy import."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mg3d.errors import ConfigError, EnvironmentProblem
from mg3d.locks import FileLock
from mg3d.training.run_folder import CHECKPOINTS, versions, write_json

__all__ = ["SCRATCH", "Plan", "Task", "find_benchmarks", "make_plan"]

SCRATCH = "scratch"
"""Name of the rows that start at random, in the sizes of the weights they are compared with."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        benchmark: folder under ``downstream/``.
        encoder: image encoder.
        label: name of its weights in the table.
        weights: the weights themselves; empty with ``label=scratch`` when there are none to take the sizes of.
        fold: held-out fold.
        seed: seed.
        program: the benchmark's ``main.py``.
        log_dir: folder of all runs.
        words: further words of the command line.
    """

    benchmark: str
    encoder: str
    label: str
    weights: str
    fold: int
    seed: int
    program: Path
    log_dir: Path
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique name; first part of the run folder's name."""
        return f"{self.benchmark}-{self.encoder}-{self.label}-fold{self.fold}"

    @property
    def arguments(self) -> list[str]:
        """Words after ``with`` that make the run what it is."""
        start = [f"weights={self.weights}"] if self.weights else []
        start += ["scratch=True"] if self.weights and self.label == SCRATCH else []
        own = [f"encoder={self.encoder}", f"fold={self.fold}", f"seed={self.seed}", f"run_name={self.name}"]
        return [*self.words, *own, *start, f"log_dir={self.log_dir}"]

    @property
    def folder(self) -> Path | None:
        """Folder of the versions of this run; None before it was started."""
        found = sorted(self.log_dir.glob(f"{self.name}-seed{self.seed}-from_*"))
        return found[0] if found else None

    @property
    def record(self) -> Path:
        """File that holds the arguments the run was started with."""
        return self.log_dir / f"{self.name}-seed{self.seed}.task.json"

    @property
    def log(self) -> Path:
        """File that receives what the run says."""
        return self.log_dir / f"{self.name}-seed{self.seed}.log"

    def finished(self) -> Path | None:
        """Newest version that ran to its end; None if there is none."""
        for _, version in versions(self.folder) if self.folder else ():
            if _state(version) == "finished" and (version / "metrics.json").is_file():
                return version
        return None

    def interrupted(self) -> bool:
        """Whether a checkpoint of an unfinished version can be gone on from."""
        found = versions(self.folder) if self.folder else []
        return any(next((version / CHECKPOINTS).glob("*.ckpt"), None) is not None for _, version in found)

    def command(self) -> list[str]:
        """Command line that starts the run, or goes on with it."""
        resume = ["resume=last"] if self.interrupted() else []
        return [sys.executable, str(self.program), "with", *self.arguments, *resume]

    def claim(self) -> FileLock:
        """Note the arguments of the run, and keep others from starting it.

        Returns:
            the lock, to be released when the run has ended.

        Raises:
            ConfigError: the folder holds a run of the same name with other arguments.
            EnvironmentProblem: another process runs it, or the folder cannot be written.
        """
        lock = FileLock(self.log_dir / f".{self.name}-seed{self.seed}.lock")
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            taken = lock.acquire()
        except OSError as error:
            message = f"cannot write in {self.log_dir}: {error.strerror}"
            raise EnvironmentProblem(message, "name another --log-dir") from error
        if not taken:
            raise EnvironmentProblem(f"{self.name} is being run by {lock.owner()}", "wait for it, or stop it")
        lock.sign()
        try:
            self._note_arguments()
        except BaseException:
            lock.release()
            raise
        return lock

    def _note_arguments(self) -> None:
        if self.record.is_file():
            before = json.loads(self.record.read_text(encoding="utf-8"))["arguments"]
            if before != self.arguments:
                changed = sorted(set(before) ^ set(self.arguments))
                raise ConfigError(
                    f"{self.name} was run with other settings before: {' '.join(changed)[:300]}",
                    "name another --log-dir, or remove its folder and its .task.json",
                )
        write_json(self.record, {"arguments": self.arguments})


Plan = list[Task]


def _state(version: Path) -> str:
    try:
        content = json.loads((version / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    return str(content.get("state", "unknown"))


def find_benchmarks(root: Path) -> dict[str, Path]:
    """Folder name -> ``main.py`` of every benchmark below a folder."""
    return {path.parent.name: path for path in sorted(root.glob("*/main.py"))}


def make_plan(
    programs: dict[str, Path],
    benchmarks: Sequence[str],
    weights: Sequence[str],
    *,
    encoders: Sequence[str] = ("swin_b",),
    folds: Sequence[int] = (0,),
    seeds: Sequence[int] = (0,),
    log_dir: Path,
    words: Sequence[str] = (),
) -> Plan:
    """Every run of a comparison, in a fixed order, so that a number always means the same run.

    Args:
        programs: name -> ``main.py``.
        benchmarks: names.
        weights: files, folders or hub ids, each as it is or as ``ENCODER=PLACE`` for one encoder only; and ``scratch``.
        encoders: image encoders.
        folds: held-out folds.
        seeds: seeds.
        log_dir: receives all runs.
        words: further words of every command line, such as ``phantom`` or ``max_epoch=10``.

    Raises:
        ConfigError: unknown benchmark, or two weights of the same name.
    """
    unknown = [name for name in benchmarks if name not in programs]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such benchmark\n  allowed: {', '.join(programs)}", "name those")
    plan = []
    for name, encoder in itertools.product(benchmarks, encoders):
        starts = _starts(weights, encoder)
        for (label, place), fold, seed in itertools.product(starts, folds, seeds):
            own = Task(name, encoder, label, place, fold, seed, programs[name].resolve(), log_dir, tuple(words))
            plan.append(own)
    return plan


def _starts(weights: Sequence[str], encoder: str) -> list[tuple[str, str]]:
    """(label, place) of the weights of an encoder; scratch takes the sizes of the first of them."""
    from mg3d.finetuning.names import weights_label

    given = []
    for word in weights:
        head, sign, place = word.partition("=")
        if word != SCRATCH and (not sign or head == encoder or "/" in head):
            given.append(word if not sign or "/" in head else place)
    labels = [weights_label(place) for place in given]
    twice = [label for label in labels if labels.count(label) > 1 or label == SCRATCH]
    if twice:
        raise ConfigError(f"two weights are called {twice[0]}", "rename one of the files or folders")
    first = [(SCRATCH, given[0] if given else "")] if SCRATCH in weights else []
    return [*first, *zip(labels, given, strict=True)]
