"""Pack CT-RATE, CTRG-Chest or your own scans into the Arrow files that pre-training reads; see ``--help``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import exit_code_of  # noqa: E402
from prepro.command_line import build_parser  # noqa: E402 - the line above makes it importable


def main(arguments: list[str] | None = None) -> int:
    """Run one packing job.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("prepro").setLevel(logging.INFO)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism
    return exit_code_of(
        lambda: _pack(options),
        disk_code=1,
        disk_remedy="check space and permissions of --out, then run it again",
        interrupted="interrupted; the same command goes on from here",
    )


def _pack(options: argparse.Namespace) -> int:
    started = time.monotonic()
    from prepro.job import run

    summary = run(options)
    summary["seconds"] = round(time.monotonic() - started, 2)
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
