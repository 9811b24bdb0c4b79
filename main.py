"""The one entry: reads the config, prepares the process, trains. ``python main.py --help`` shows the usage."""

from __future__ import annotations

import copy
import sys
from typing import Any

from mg3d.config import ex
from mg3d.config_cli import parse_command_line, run_words
from mg3d.config_schema import resolve_config

NOTICES: list[str] = []


@ex.main
def train(_config: dict[str, Any]) -> dict[str, Any]:
    """Train, resume or test as the config says, and return the final metrics."""
    config = resolve_config(copy.deepcopy(_config))
    from mg3d.training.environment import ensure_process_defaults

    ensure_process_defaults(config.num_threads)  # may start this process again, so nothing is printed before it
    for notice in NOTICES:
        print(notice, file=sys.stderr)
    from mg3d.training import console, trainer

    console.configure_console()
    result = trainer.run(config)
    console.print_result(result)
    return result


def main(words: list[str]) -> int:
    """Run one command line (without the program name) and return the exit code."""
    return run_words(ex, lambda: parse_command_line(ex, words), lambda request: NOTICES.extend(request.notices))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
