"""Compare the shipped modules with recorded reference tensors: ``python tools/check_golden.py [DIR]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RECORDED = REPOSITORY / "tests" / "reference" / "golden" / "v1"
sys.path.insert(0, str(REPOSITORY))


def main(arguments: list[str] | None = None) -> int:
    """Print one line per entry and a JSON summary.

    Args:
        arguments: command line without the program name.

    Returns:
        0 when every entry passed, 1 when one differs, 2 when the directory cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=RECORDED,
        help="folder with index.json (default: the one in tests/reference of this checkout)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="torch threads (results must not depend on it)")
    parser.add_argument("--details", action="store_true", help="print the traceback of an adapter that raised")
    options = parser.parse_args(arguments)

    import torch

    from tools.golden.index import GoldenError
    from tools.golden.runner import check_directory

    torch.set_num_threads(options.threads)
    try:
        outcomes = check_directory(options.directory, details=options.details)
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for outcome in outcomes:
        print(outcome.line())
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} entries pass")
    compared = sum(outcome.compared for outcome in outcomes)
    print(json.dumps({"entries": len(outcomes), "passed": len(outcomes) - len(failed), "compared": compared}))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
