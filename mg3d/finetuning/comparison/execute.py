"""Run a plan here, several at once if asked to, or write the SLURM script that does. No heavy import."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mg3d.atomic import write_text_atomically
from mg3d.errors import EnvironmentProblem, RunFailedError
from mg3d.finetuning.comparison.plan import Task

log = logging.getLogger(__name__)

__all__ = ["array_script", "become", "run_plan", "run_task", "write_array"]


def run_task(task: Task, place: str = "") -> int:
    """Start a run, or go on with it; nothing is done for a finished one.

    Args:
        task: the run.
        place: where in the plan it stands, for the message.

    Returns:
        Its exit code.
    """
    if task.finished():
        log.info("%s %s: finished before", place, task.name)
        return 0
    try:
        lock = task.claim()
    except EnvironmentProblem as error:
        log.error("%s %s", place, error)
        return error.exit_code
    started = time.monotonic()
    command = task.command()
    again = ", goes on" if command[-1] == "resume=last" else ""
    log.info("%s %s: started%s, log %s", place, task.name, again, task.log)
    try:
        with open(task.log, "a", encoding="utf-8") as stream:
            stream.write(f"$ {shlex.join(command)}\n")
            stream.flush()
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    finally:
        lock.release()
    seconds = time.monotonic() - started
    if code == 0:
        log.info("%s %s: finished in %.0f s", place, task.name, seconds)
    else:
        log.error("%s %s: exit code %d after %.0f s: %s", place, task.name, code, seconds, _last_words(task.log))
    return code


def become(task: Task) -> int:
    """Turn this process into the run, so that a scheduler's signals reach it; returns only for a finished one."""
    if task.finished():
        log.info("%s: finished before", task.name)
        return 0
    task.claim().survive_exec()
    command = task.command()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def _last_words(path: Path) -> str:
    """The error message at the end of a log, or its last line."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = [line for line in lines[-40:] if line.startswith("error: ")]
    return (told or lines or [""])[-1][-300:]


def run_plan(plan: Sequence[Task], jobs: int = 1) -> list[Task]:
    """Run everything that is not finished; one failure does not stop the others.

    Args:
        plan: the runs.
        jobs: runs at the same time.

    Returns:
        The runs that failed.

    Raises:
        RunFailedError: the last of several runs was interrupted from the keyboard.
    """
    places = [f"[{index + 1}/{len(plan)}]" for index in range(len(plan))]
    try:
        with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
            codes = list(pool.map(run_task, plan, places))
    except KeyboardInterrupt as error:
        raise RunFailedError("stopped", "start the same command again: finished runs are kept") from error
    return [task for task, code in zip(plan, codes, strict=True) if code]


def array_script(program: Path, words: Sequence[str], count: int, log_dir: Path, options: Sequence[str] = ()) -> str:
    """A SLURM array of one job a run; a job that is started again goes on.

    Args:
        program: ``run_all.py``.
        words: its command line, without ``--array`` and its options.
        count: number of runs.
        log_dir: receives what the jobs say.
        options: further ``#SBATCH`` options, e.g. ``--gres=gpu:1``.
    """
    settings = [
        "--job-name=mg3d-downstream",
        f"--array=0-{count - 1}",
        f"--output={log_dir}/slurm-%A_%a.log",
        "--signal=B:TERM@120",
        "--requeue",
        *options,
    ]
    line = shlex.join([sys.executable, str(program), *words, "--task"])
    header = "\n".join(f"#SBATCH {setting}" for setting in settings)
    return f'#!/bin/bash\n{header}\n\nset -eu\nexec {line} "$SLURM_ARRAY_TASK_ID"\n'


def write_array(place: str, text: str, log_dir: Path) -> None:
    """Write the script to a file, or to standard output for ``-``."""
    log_dir.mkdir(parents=True, exist_ok=True)  # SLURM does not make the folder of its logs
    if place == "-":
        sys.stdout.write(text)
        return
    write_text_atomically(Path(place), text)
    log.info("submit with: sbatch %s", place)
