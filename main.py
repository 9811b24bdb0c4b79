"""The one entry: reads the config, prepares the process, trains. ``python main.py --help`` shows the usage."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

from mg3d.config import ex
from mg3d.config_cli import parse_command_line, refusal_text, run_request
from mg3d.config_schema import resolve_config
from mg3d.errors import ConfigError, MG3DError

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
    try:
        request = parse_command_line(ex, words)
        if request.help_text:
            print(request.help_text)
            return 0
        NOTICES.extend(request.notices)
        run_request(ex, request)
    except MG3DError as error:
        # Every process of a job refuses the same config: one of them says so. What one rank meets alone, it tells.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(refusal_text(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
