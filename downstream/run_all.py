"""Run benchmarks over encoders, weights and folds, and compare weights with training from scratch.

``python downstream/run_all.py --help``; finished runs are kept, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, where it is not installed

from mg3d.command_line import Parser, exit_code_of
from mg3d.errors import ConfigError
from mg3d.finetuning.comparison.execute import array_script, become, run_plan, write_array
from mg3d.finetuning.comparison.plan import find_benchmarks, make_plan

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--benchmarks", nargs="+", default=["all"], help="folders under downstream/, or all (default)")
    made.add_argument(
        "--weights", nargs="+", default=["scratch"], help="scratch, files, folders, hub ids, or ENCODER=any of these"
    )
    made.add_argument("--encoders", nargs="+", default=["swin_b"], help="image encoders (default: swin_b)")
    made.add_argument("--folds", nargs="+", type=int, default=[0], help="held-out folds (default: 0)")
    made.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds (default: 0)")
    made.add_argument(
        "--set", nargs="+", default=[], metavar="WORD", help="words for every run: phantom, data_fraction=0.1 ..."
    )
    made.add_argument("--log-dir", type=Path, default=Path("result/downstream"), help="receives runs and tables")
    made.add_argument("--benchmark-dir", type=Path, default=HERE, help=argparse.SUPPRESS)
    made.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    made.add_argument("--metric", default="", help="figure to compare (default: the headline of each benchmark)")
    made.add_argument("--rounds", type=int, default=1000, help="bootstrap rounds of the table (default: 1000)")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the runs and how far they are, and end")
    what.add_argument("--table", action="store_true", help="only make the table of what is finished")
    what.add_argument("--array", metavar="FILE", help="write a SLURM array script (- prints it) instead of running")
    what.add_argument("--task", type=int, help="run the one with this number (in a SLURM array)")
    made.add_argument("--sbatch", nargs="+", default=[], metavar="OPTION", help="as gres=gpu:1, for --array")
    return made


def main(words: Sequence[str]) -> int:
    """Run one command line and return the exit code: 0 fine, 1 a run failed, 2 bad input."""
    options = parser().parse_args(words)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    return exit_code_of(
        lambda: _run(options, list(words)),
        disk_code=1,
        disk_remedy="check space and permissions of --log-dir",
        interrupted="interrupted; start the same command again: finished runs are kept",
    )


def _run(options: argparse.Namespace, words: list[str]) -> int:
    programs = find_benchmarks(options.benchmark_dir)
    chosen = list(programs) if options.benchmarks == ["all"] else options.benchmarks
    plan = make_plan(
        programs,
        chosen,
        options.weights,
        encoders=options.encoders,
        folds=options.folds,
        seeds=options.seeds,
        log_dir=options.log_dir,
        words=options.set,
    )
    if options.list:
        states = ["finished" if task.finished() else "begun" if task.folder else "-" for task in plan]
        print(
            "\n".join(f"{k:4} {state:9} {task.name}" for k, (task, state) in enumerate(zip(plan, states, strict=True)))
        )
        return 0
    if options.array:
        extra = [f"--{option.lstrip('-')}" for option in options.sbatch]
        script = array_script(Path(__file__).resolve(), _without_array(words), len(plan), options.log_dir, extra)
        write_array(options.array, script, options.log_dir)
        return 0
    if options.task is not None:
        if not 0 <= options.task < len(plan):
            raise ConfigError(f"--task {options.task}: the plan has {len(plan)} runs", f"give 0 to {len(plan) - 1}")
        return become(plan[options.task])
    failed = [] if options.table else run_plan(plan, options.jobs)
    from mg3d.finetuning.comparison.table import collect, markdown, write_tables

    lines = collect(plan, options.rounds, options.metric)
    for path in write_tables(lines, options.log_dir):
        logging.info("wrote %s", path)
    print(markdown(lines), end="")
    return 1 if failed else 0


def _without_array(words: list[str]) -> list[str]:
    """The command line without ``--array FILE`` and ``--sbatch ...``."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word.split("=")[0] in ("--array", "--sbatch")
        if not skipping:
            kept.append(word)
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
