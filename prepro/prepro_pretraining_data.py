"""Pack CT-RATE, CTRG-Chest or your own scans into the Arrow files that pre-training reads; see ``--help``."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.errors import MG3DError  # noqa: E402 - the line above makes it importable
from prepro.command_line import build_parser  # noqa: E402


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
    started = time.monotonic()
    from prepro.job import run

    try:
        summary = run(options)
    except MG3DError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    except OSError as problem:
        sys.stderr.write(f"error: {problem}\n  mend: check space and permissions of --out, then run it again\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return 130
    summary["seconds"] = round(time.monotonic() - started, 2)
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
