"""Start, watch and kill runs of the tiny task in processes of their own (forked from a warm server)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mg3d.training.logging_jsonl import read_lines

HERE = Path(__file__).resolve().parent
# The server of Python 3.11 looks for what it preloads on PYTHONPATH alone.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tiny_task", "tiny_runs"])
DEADLINE_S = 120.0


def _child(keys: dict[str, Any], output: str, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    multiprocessing.set_start_method("fork", force=True)  # loader workers as in a run from the shell
    stream = open(output, "w", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    import tiny_task

    sys.argv = ["tiny_task.py", *(f"{key}={value}" for key, value in keys.items())]
    code = tiny_task.main()
    sys.stdout.flush()
    sys.exit(code)


def start(log_dir: Path, environ: dict[str, str] | None = None, output: str = "output.txt", **keys: Any) -> BaseProcess:
    """A run of the tiny task; its output goes to a file in ``log_dir``."""
    log_dir.mkdir(parents=True, exist_ok=True)
    environ = {"OMP_NUM_THREADS": "1", **(environ or {})}
    arguments = ({"log_dir": str(log_dir), **keys}, str(log_dir / output), environ)
    process = CONTEXT.Process(target=_child, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess, log_dir: Path, output: str = "output.txt") -> int:
    """Exit code of a run (negative: killed by that signal)."""
    process.join(DEADLINE_S)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError((log_dir / output).read_text(encoding="utf-8")[-2000:])
    return process.exitcode


def train(log_dir: Path, **keys: Any) -> Path:
    """A run to its end; returns its folder."""
    code = finish(start(log_dir, **keys), log_dir)
    output = (log_dir / "output.txt").read_text(encoding="utf-8")
    if code:
        raise AssertionError(f"exit code {code}\n{output[-3000:]}")
    return newest(log_dir)


def newest(log_dir: Path) -> Path:
    """Newest run folder of a log folder that holds one experiment."""
    folders = log_dir.glob("*/version_*")
    return max(folders, key=lambda folder: int(folder.name.split("_")[1]))


def lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> line of the step log (empty before the first)."""
    path = run_dir / "metrics.jsonl"
    return {line["step"]: line for line in read_lines(path)} if path.exists() else {}


def resumed_step(run_dir: Path) -> int:
    """Step of the checkpoint that a run went on with."""
    return json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["resumed_step"]


def wait_until(condition: Any, process: BaseProcess) -> None:
    """Wait until a condition holds, the process ended, or two minutes passed."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)


def kill_after_step(log_dir: Path, step: int, signum: int = signal.SIGKILL, **keys: Any) -> tuple[Path, int]:
    """Start a run and signal it once the line of ``step`` is written; returns run folder and exit code."""
    before = set(log_dir.glob("*/version_*"))
    process = start(log_dir, **keys)
    wait_until(lambda: set(log_dir.glob("*/version_*")) - before and step in lines(newest(log_dir)), process)
    os.kill(process.pid, signum)
    return newest(log_dir), finish(process, log_dir)


def compared(line: dict[str, Any]) -> dict[str, Any]:
    """What must be identical in two runs: everything but the clock."""
    return {key: value for key, value in line.items() if key not in ("seconds", "samples_per_s")}


def write_checkpoints(path: Path, first_step: int) -> None:
    """Overwrite one checkpoint until killed."""
    import torch

    from mg3d.training.checkpoint_io import AtomicCheckpointIO

    for step in range(first_step, first_step + 1000):
        content = {"global_step": step, "epoch": 0, "state_dict": {"w": torch.full((400_000,), float(step))}}
        AtomicCheckpointIO().save_checkpoint({**content, "optimizer_states": []}, path)
