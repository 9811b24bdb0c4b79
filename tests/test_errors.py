"""Errors a user can meet are of a few classes, each with a remedy; no library path ends the process or asserts."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mg3d import errors

FOLDERS = ("mg3d", "prepro", "tools", "downstream", "main.py")
SMALL_SET = {"ConfigError", "DataError", "CheckpointError", "EnvironmentProblem", "RunFailedError", "OutputError"}
OF_A_KIND = {
    "RunStoppedError": "RunFailedError",  # mg3d/training/signals.py
    "UnknownEncoderError": "ConfigError",  # mg3d/models/vision_encoders/registry.py, a ValueError to its callers too
}
FOR_PROGRAMMERS = {"ValueError", "TypeError", "NotImplementedError", "KeyError", "IndexError", "AttributeError"}
FOR_PROGRAMMERS |= {"StopIteration", "ArgumentTypeError"}
"""Misuse of a function by its caller, and what ``argparse`` and protocols of the language ask for."""
WITHOUT_REMEDY = {"MG3DError", "Exception", "BaseException", "AssertionError", "SystemExit", "KeyboardInterrupt"}


def sources(repository: Path) -> Iterator[tuple[str, ast.Module]]:
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=repository, capture_output=True, encoding="utf-8", check=True
    ).stdout
    for name in listed.splitlines():
        if name.endswith(".py") and "golden" not in name:
            yield name, ast.parse((repository / name).read_text(encoding="utf-8"))


def raised(node: ast.Raise) -> str:
    target = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""


def test_no_path_ends_in_a_bare_assertion_or_in_an_error_without_meaning(repository: Path) -> None:
    wrong = []
    for name, tree in sources(repository):
        guards = {id(child) for node in tree.body if isinstance(node, ast.If) for child in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                wrong.append(f"{name}:{node.lineno}: assert")
            if isinstance(node, ast.Raise) and raised(node) in WITHOUT_REMEDY and id(node) not in guards:
                wrong.append(f"{name}:{node.lineno}: raise {raised(node)}")
    assert wrong == []


def test_no_library_function_prints_and_ends_the_process(repository: Path) -> None:
    wrong = []
    for name, tree in sources(repository):
        guards = {id(child) for node in tree.body if isinstance(node, ast.If) for child in ast.walk(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or id(node) in guards:
                continue
            called = ast.unparse(node.func)
            if called in ("exit", "quit", "sys.exit") or (called == "os._exit" and name != "prepro/engines/pool.py"):
                wrong.append(f"{name}:{node.lineno}: {called}")
    assert wrong == []


def test_every_error_for_users_is_of_the_small_set_and_has_a_remedy(repository: Path) -> None:
    wrong = []
    for name, tree in sources(repository):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in SMALL_SET - {"OutputError"}:
                keywords = {word.arg for word in node.keywords}
                empty = len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and not node.args[1].value
                starred = any(isinstance(part, ast.Starred) for part in node.args) or None in keywords
                if empty or (len(node.args) < 2 and "remedy" not in keywords and not starred):
                    wrong.append(f"{name}:{node.lineno}: {called} without a remedy")
    assert wrong == []


def test_no_other_class_of_errors_is_made(repository: Path) -> None:
    made = []
    for name, tree in sources(repository):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Problem")) and node.bases:
                made.append((name, node.name))
    places = {name for name, kind in made if kind not in OF_A_KIND}
    assert places == {"mg3d/errors.py"}, made


@pytest.mark.parametrize("kind", sorted(SMALL_SET - {"OutputError"}))
def test_each_class_says_message_and_remedy_and_ends_with_its_exit_code(kind: str) -> None:
    error = getattr(errors, kind)("scan 3 is empty", "copy it again")
    assert str(error) == "scan 3 is empty\n  mend: copy it again"
    assert error.exit_code == (1 if kind == "RunFailedError" else 2)
    full = errors.OutputError("out", "No space left on device", "free some")
    assert full.exit_code == 1 and full.path == "out" and isinstance(full, errors.RunFailedError)
