"""Run a command in this process and read what it printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Main = Callable[[list[str]], int]


def answer(capsys: pytest.CaptureFixture[str], main: Main, *words: object, code: int = 0) -> dict[str, Any]:
    """The JSON object of the last line, and everything before it as ``printed``."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    *lines, last = captured.out.splitlines()
    return {"printed": "\n".join(lines), "told": captured.err} | json.loads(last)


def refusal(capsys: pytest.CaptureFixture[str], main: Main, *words: object) -> str:
    """The message of a command that ends with exit code 2: at most five lines, an error and a mend, no answer."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith((" ", "error")) or line]
    lines = lines[next(place for place, line in enumerate(lines) if line.startswith("error: ")) :]
    assert code == 2 and len(lines) <= 5 and "Traceback" not in captured.err, captured.err
    assert "mend: " in lines[-1] and not captured.out.strip()
    return "\n".join(lines)


def modules_after(repository: Path, module: str, *words: object) -> tuple[int, set[str]]:
    """Exit code of a command in a fresh process, and which heavy libraries it had imported at its end."""
    program = (
        f"import sys\nfrom {module} import main\ntry:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "print('\\n', code, *{'torch', 'monai', 'transformers'} & set(sys.modules))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    code, *heavy = told.stdout.splitlines()[-1].split()
    return int(code), set(heavy)
