"""Does a run that is killed again and again end as one that nothing disturbed? By hand: ``python benchmarks/soak.py``.

A tiny pre-training job on phantom studies is trained once without a break, then again and again with a SIGKILL at
random moments (start-up, a step, a validation, the writing of a checkpoint) and ``resume_from=last``, until the minutes
are over; jobs limited by steps and by epochs take turns, without and with loader workers. Every line of every version,
the final weights and the resident memory are compared. The last line is one JSON object. Exit code 0: all equal; 1: a
line or a weight differs, memory grew, or a run failed by itself; 2: bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of  # noqa: E402
from mg3d.errors import DataError, RunFailedError  # noqa: E402 - the lines above make it importable
from mg3d.training.logging_jsonl import read_lines  # noqa: E402

MAX_MINUTES = 60.0
LONGEST_ATTEMPT_S = 600.0
MEMORY_FACTOR = 1.25
PHASES = ("start-up", "step", "validation", "checkpoint")
MEASURED = ("time", "seconds", "per_s", "memory", "rss")
"""Parts of the names of what a line measures of the machine."""
STEPS, EPOCHS = 24, 3
JOBS = {
    "steps": ["max_epoch=None", f"max_steps={STEPS}", "num_workers=0"],
    "epochs": [f"max_epoch={EPOCHS}", "max_steps=None", "num_workers=0"],
    "steps, 2 workers": ["max_epoch=None", f"max_steps={STEPS}", "num_workers=2"],
}


@dataclass
class Attempt:
    """One process: how it ended and what was seen of it."""

    code: int
    first_line_s: float
    peak_rss_mib: float


@dataclass
class Soak:
    """What was counted.

    Attributes:
        kills: per phase.
        lines: compared with the unbroken run.
        differing: descriptions of what is not equal.
        failures: runs that ended by themselves, or not at all.
        runs: broken runs that came to their end.
        rss: peak in MiB of unbroken runs and of attempts.
    """

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    lines: int = 0
    differing: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    runs: int = 0
    rss: dict[str, float] = field(default_factory=lambda: {"unbroken": 0.0, "broken": 0.0})

    def summary(self) -> dict[str, Any]:
        """The last line."""
        grew = self.rss["broken"] > MEMORY_FACTOR * self.rss["unbroken"]
        return {
            "ok": not (self.differing or self.failures or grew) and self.runs > 0,
            "kills": sum(self.kills.values()),
            "kills_in": self.kills,
            "runs": self.runs,
            "lines_compared": self.lines,
            "differing": len(self.differing),
            "first_differing": self.differing[:3],
            "failures": self.failures[:3],
            "peak_rss_mib": {name: round(value) for name, value in self.rss.items()},
        }


def make_data(folder: Path) -> list[str]:
    """Write phantom studies, pack them, and return the words that name them."""
    studies, arrows = folder / "studies", folder / "arrows"
    sizes = ["--train", "12", "--test", "2", "--ctrg", "2", "--size", "32", "--workers", "1"]
    packing = ["ct_rate", "--root", str(studies / "ct_rate"), "--out", str(arrows), "--image-size", "64", "32", "64"]
    for command in (
        ["-m", "mg3d.phantoms", "--out", str(studies), *sizes],
        ["prepro/prepro_pretraining_data.py", *packing, "--target-spacing", "none"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise RunFailedError(f"{' '.join(command[:2])} failed: {done.stderr[-500:]}", "see its message")
    return [f"data_root={arrows}", f"tokenizer={studies / 'text_encoder'}", "datasets=['clm_ct_rate']"]


def command(words: list[str], log_dir: Path, resume: bool) -> list[str]:
    """The command line of an attempt."""
    own = ["checkpoint_every_n_steps=3", "log_every_n_steps=1", "num_threads=1", f"log_dir={log_dir}"]
    again = ["resume_from=last"] if resume else []
    return [sys.executable, "main.py", "with", "task_pretrain_mg3d", "tiny", *words, *own, *again]


def versions(log_dir: Path) -> list[Path]:
    """Run folders, the oldest first."""
    return sorted(log_dir.glob("*/version_*"), key=lambda path: int(path.name.split("_")[1]))


def lines_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> what the line of the step says, without what was measured of the machine."""
    path = run_dir / "metrics.jsonl"
    found = read_lines(path) if path.is_file() else []
    return {
        line["step"]: {key: value for key, value in line.items() if not any(part in key for part in MEASURED)}
        for line in found
        if "step" in line
    }


def rss_mib(pid: int) -> float:
    """Resident memory of a process, 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def run_attempt(words: list[str], log_dir: Path, resume: bool, kill: Iterator[bool] | None) -> Attempt:
    """Start a process; kill it when ``kill`` yields True.

    Args:
        words: of the job.
        log_dir: of the run.
        resume: go on from the last checkpoint.
        kill: asked every few milliseconds; None lets the process end.
    """
    began, first, peak = time.monotonic(), 0.0, 0.0
    known = len(versions(log_dir))
    log_dir.mkdir(parents=True, exist_ok=True)
    with (log_dir / "output.txt").open("ab") as log:
        process = subprocess.Popen(command(words, log_dir, resume), cwd=ROOT, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                peak = max(peak, rss_mib(process.pid))
                newest = versions(log_dir)[known:]
                if not first and newest and (newest[-1] / "metrics.jsonl").is_file():
                    first = time.monotonic() - began
                if time.monotonic() - began > LONGEST_ATTEMPT_S or (kill is not None and next(kill)):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                time.sleep(0.002 if kill is not None else 0.05)
        finally:
            process.kill()
            process.wait()
    return Attempt(process.returncode, first, peak)


def killer(phase: str, log_dir: Path, rng: random.Random, start_up_s: float) -> Iterator[bool]:
    """Say when to kill.

    Args:
        phase: of :data:`PHASES`.
        log_dir: of the run.
        rng: decides on the moment.
        start_up_s: seconds that a start-up takes here.
    """
    began, known, wanted = time.monotonic(), len(versions(log_dir)), rng.randint(1, 8)
    delay = {"start-up": rng.uniform(0.1, start_up_s), "step": rng.uniform(0, 0.3)}.get(phase, rng.uniform(0, 0.05))
    seen_at = began if phase == "start-up" else 0.0
    while True:
        run = versions(log_dir)[known:]
        if not seen_at and run:
            done = len(lines_of(run[-1]))
            due = {
                "step": lambda done=done: done >= wanted,
                "validation": lambda done=done, run=run: done > 0 and max(lines_of(run[-1])) % (STEPS // 4) == 0,
                "checkpoint": lambda run=run: any((run[-1] / "checkpoints").glob(".*.tmp")),
            }[phase]
            seen_at = time.monotonic() if due() else 0.0
        yield bool(seen_at) and time.monotonic() - seen_at >= delay * (phase != "checkpoint")


def compare(soak: Soak, place: str, reference: Path, log_dir: Path) -> None:
    """Compare all lines of all versions and the final weights with those of the unbroken run."""
    import torch

    from mg3d.training.checkpoint_io import load_file

    expected = lines_of(reference)
    last: set[int] = set()
    for run in versions(log_dir):
        found = lines_of(run)
        last |= set(found)
        soak.lines += len(found)
        wrong = [step for step, line in found.items() if line != expected.get(step)]
        soak.differing += [f"{place}, {run.name}, step {step}" for step in wrong]
    soak.differing += [f"{place}: step {step} is missing" for step in sorted(set(expected) - last)]
    one, other = (load_file(run / "checkpoints/last.ckpt")["state_dict"] for run in (reference, versions(log_dir)[-1]))
    soak.differing += [f"{place}: weights {name}" for name in one if not torch.equal(one[name], other[name])]


def break_a_run(soak: Soak, name: str, words: list[str], log_dir: Path, rng: random.Random, options: Any) -> bool:
    """Kill and resume a run until it ends; False when it failed by itself."""
    while True:
        may_kill = time.monotonic() < options.until and sum(soak.kills.values()) < options.kills
        phase = rng.choice(PHASES)
        resume = any(log_dir.glob("*/version_*/checkpoints/*.ckpt"))
        kill = killer(phase, log_dir, rng, options.start_up_s) if may_kill else None
        attempt = run_attempt(words, log_dir, resume, kill)
        soak.rss["broken"] = max(soak.rss["broken"], attempt.peak_rss_mib)
        if attempt.code == 0:
            soak.runs += 1
            return True
        if attempt.code != -signal.SIGKILL or kill is None:
            said = (log_dir / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            soak.failures.append(f"{name}: exit code {attempt.code}: {' '.join(said[-3:])[-300:]}")
            return False
        soak.kills[phase] += 1
        sys.stderr.write(f"{name}: killed in {phase}\n")


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code."""
    if not 0 < options.minutes <= MAX_MINUTES:
        raise DataError(f"--minutes {options.minutes:g}", f"give more than 0 and at most {MAX_MINUTES:g}")
    soak, rng = Soak(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="soak_") as scratch:
        folder = options.out or Path(scratch)
        data = make_data(folder)
        options.until = time.monotonic() + 60 * options.minutes
        references: dict[str, Path] = {}
        for number, name in enumerate(name for _ in range(1000) for name in options.jobs):
            if number and (time.monotonic() > options.until or sum(soak.kills.values()) >= options.kills):
                break
            words = [*data, *JOBS[name]]
            if name not in references:
                unbroken = run_attempt(words, folder / f"unbroken {name}", False, None)
                if unbroken.code:
                    raise RunFailedError(
                        f"the unbroken run ended with {unbroken.code}", f"see {folder}/unbroken {name}"
                    )
                references[name] = versions(folder / f"unbroken {name}")[-1]
                soak.rss["unbroken"] = max(soak.rss["unbroken"], unbroken.peak_rss_mib)
                options.start_up_s = unbroken.first_line_s
            log_dir = folder / f"broken {number}"
            if break_a_run(soak, name, words, log_dir, rng, options):
                compare(soak, f"run {number} ({name})", references[name], log_dir)
    summary = {"seed": options.seed, "minutes": options.minutes, **soak.summary()}
    sys.stdout.write(json.dumps(summary) + "\n")
    return 0 if summary["ok"] else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the soak.

    Args:
        arguments: command line without the program name.

    Returns:
        the exit code.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="kill for so long, at most 60 (30)")
    parser.add_argument("--kills", type=int, default=10**6, metavar="N", help="or so often")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument(
        "--jobs", nargs="+", choices=tuple(JOBS), default=list(JOBS), metavar="JOB", help=f"{list(JOBS)}"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep everything here; default: removed at the end")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return exit_code_of(
        lambda: run(options), disk_code=1, disk_remedy="check space and permissions of --out", interrupted="interrupted"
    )


if __name__ == "__main__":
    raise SystemExit(main())
