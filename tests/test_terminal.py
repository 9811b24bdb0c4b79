"""A terminal without the letters of a text prints escapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_an_ascii_terminal_ends_no_run(repository: Path) -> None:
    code = "from mg3d.terminal import tolerate_any_encoding as t; t(); print('caf\\u00e9\\u2026')"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=plain, capture_output=True, check=True)
    assert done.stdout == b"caf\\xe9\\u2026" + os.linesep.encode()
