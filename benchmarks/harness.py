"""Fresh processes, memory figures and interleaved timing for the benchmarks; imports no torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d.training.environment import missing_defaults

GIB = 2**30
MIN_ROUNDS = 3
ROOT = Path(__file__).resolve().parent.parent


def memory_gib(field: str) -> float:
    """Memory of this process in GiB.

    Args:
        field: ``VmRSS`` (resident now) or ``VmHWM`` (largest so far).
    """
    status = Path("/proc/self/status")
    if not status.is_file():  # only the largest value is to be had outside Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / GIB


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        wall: as the clock on the wall shows.
        cpu: processor time of this process; tells the work apart from waiting on a busy machine.
    """

    wall: float
    cpu: float

    @staticmethod
    def fastest(timings: Mapping[str, list[Timing]], kind: str) -> dict[str, float]:
        """Smallest ``wall`` or ``cpu`` seconds of every subject."""
        return {name: min(getattr(each, kind) for each in found) for name, found in timings.items()}


def run_fresh(module: str, options: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a benchmark subject in a new process, with the allocator and thread defaults that a training run sets.

    Args:
        module: of this folder; prints one JSON object as its last line.
        options: handed over as ``--key value``; ``threads`` above 0 also sets the thread variables.
        variables: of the environment, in place of those defaults.

    Raises:
        SystemExit: the process failed; its messages are on the error stream.
    """
    if variables is None:
        variables = missing_defaults(os.environ, options.get("threads", 0))
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def best_of_turns(
    module: str,
    subjects: Mapping[str, Mapping[str, Any]],
    rounds: int,
    describe: Callable[[int, str, dict[str, Any]], str],
) -> dict[str, dict[str, float]]:
    """Run subjects in fresh processes that take turns.

    Args:
        module: of this folder, for :func:`run_fresh`.
        subjects: name -> options of its process.
        rounds: turns of each, at least :data:`MIN_ROUNDS`.
        describe: round, name and figures of a turn -> the line to print.

    Returns:
        name -> the smallest value of every figure.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for number in range(max(rounds, MIN_ROUNDS)):
        for name, options in subjects.items():
            result = run_fresh(module, options)
            found[name].append(result)
            print(describe(number, name, result), flush=True)
    return {name: {key: min(each[key] for each in turns) for key in turns[0]} for name, turns in found.items()}


def interleave(
    subjects: Mapping[str, Callable[[], object]], rounds: int, turn_s: float = 0.0
) -> dict[str, list[Timing]]:
    """Time several functions in turns, so that a slow spell of the machine meets all of them.

    Args:
        subjects: name -> function; each has one turn before the first timed round.
        rounds: timed turns of each.
        turn_s: seconds that a turn lasts at least; short functions are called repeatedly, the fastest call counts.
    """
    found: dict[str, list[Timing]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, call in subjects.items():
            turn = _take_turn(call, turn_s)
            if number:
                found[name].append(turn)
    return found


def _take_turn(call: Callable[[], object], turn_s: float) -> Timing:
    calls: list[Timing] = []
    while not calls or sum(each.wall for each in calls) < turn_s:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        calls.append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return min(calls, key=lambda each: each.wall)
