"""Check packed arrows, or a download before packing; ``--help`` says how."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import exit_code_of  # noqa: E402 - the line above makes it importable
from mg3d.locks import exclusive_output  # noqa: E402
from prepro.verification.command import build_verify_parser  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Check what the command line names and print what was found.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_verify_parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism
    return exit_code_of(
        lambda: _verify(options),
        disk_code=2,
        disk_remedy="check space and permissions there",
        interrupted="interrupted",
    )


def _verify(options: argparse.Namespace) -> int:
    from prepro.verification.report import write_json
    from prepro.verification.run import verify

    started = time.monotonic()
    with exclusive_output(options.json, what="--json") if options.json else nullcontext():
        report = verify(options)
        code = report.exit_code(options.strict)
        if options.json:
            write_json(report, options.json, code, [str(path) for path in options.paths])
    summary = report.summary() | {"exit": code, "seconds": round(time.monotonic() - started, 2)}
    sys.stdout.write(f"{report.text()}\n{json.dumps(summary)}\n".lstrip("\n"))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
