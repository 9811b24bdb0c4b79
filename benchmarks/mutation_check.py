"""Share of small faults in the numeric core (losses, metrics, geometry) that the fast tests of each file find.

    nice -n 15 python -m benchmarks.mutation_check                      a sample of 20 mutants a file
    nice -n 15 python -m benchmarks.mutation_check --sample 0 --files mg3d/models/losses.py

A mutant is the file with one operator, constant, condition or returned value changed; docstrings, annotations, raised
messages and text are left alone. It runs in a fork that has the libraries imported already, with the tests that name
the file's module (or the one in ``TESTS``), slow ones left out. It counts as killed when a test fails or hangs. The
survivors are printed: some are equivalent (an epsilon, a cache), the others ask for a test. The last line of standard
output is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from benchmarks.harness import ROOT

FILES = ("mg3d/models/losses.py", "mg3d/scans/geometry.py", "mg3d/metrics/*.py")
TESTS = {
    "mg3d/models/losses.py": ["tests/models/test_losses.py"],
    "mg3d/scans/geometry.py": [
        f"tests/scans/test_{name}.py" for name in ("geometry", "geometry_native", "geometry_properties", "prepare")
    ],
}
"""Tests of a file whose module many others name, too; mutants do not reach processes that tests spawn."""
LIBRARIES = ("torch", "numpy", "scipy.stats", "hypothesis", "pytest", "safetensors.torch", "transformers", "nibabel")
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def places(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below ``node`` that may be changed, in order of the source."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr, ast.Assert)):
                yield child
                yield from places(child)


def changes(node: ast.AST) -> list[str]:
    """Names of the changes that one node allows."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        return ["swap"] if type(node.op) in SWAPS else []
    if isinstance(node, ast.Compare):
        return ["swap"] if type(node.ops[0]) in SWAPS else []
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return ["drop the operator"]
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        return ["another constant"]
    if isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, ast.UnaryOp):
        return ["negate the condition"]
    return ["return nothing"] if isinstance(node, ast.Return) and node.value is not None else []


def change(node: ast.AST, parent: ast.AST) -> None:
    """Change a node in place (or in its parent)."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        node.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1  # type: ignore[operator]
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return):
        node.value = ast.Constant(None)
    elif isinstance(node, ast.UnaryOp):
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, node.operand)
            elif isinstance(value, list) and node in value:
                value[value.index(node)] = node.operand


def mutants(source: str) -> list[tuple[int, str, str]]:
    """Every changed source with the line and the old and new text of what was changed."""
    tree = ast.parse(source)
    found = []
    for number, node in enumerate(places(tree)):
        for name in changes(node):
            other = copy.deepcopy(tree)
            target = list(places(other))[number]
            parent = next(each for each in ast.walk(other) if target in ast.iter_child_nodes(each))
            change(target, parent)
            line = getattr(node, "lineno", 0)
            found.append((line, f"{name}: {ast.unparse(node).splitlines()[0][:80]}", ast.unparse(other)))
    return found


class Mutated(importlib.abc.MetaPathFinder):
    """Gives a changed file in place of one module."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Spec of the one module."""
        return importlib.util.spec_from_file_location(fullname, self.file) if fullname == self.name else None


def outcome(name: str, source: str, tests: Sequence[str], limit_s: float) -> int:
    """Exit code of pytest in a fork with the mutant; anything above zero is a kill."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mutant.py"
        file.write_text(source, encoding="utf-8")
        return _exit_code(Mutated(name, file), tests, limit_s)


def _exit_code(mutated: Mutated, tests: Sequence[str], limit_s: float) -> int:
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        sys.dont_write_bytecode = True  # a mutant of the same size and second would be taken for the last one
        sys.meta_path.insert(0, mutated)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests])))
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return signal.SIGKILL


def tests_of(path: str) -> list[str]:
    """Test files of the metrics (or those of ``TESTS``) that name the module of a file."""
    name = path.removesuffix(".py").replace("/", ".")
    found = [str(each.relative_to(ROOT)) for each in sorted((ROOT / "tests/metrics").glob("test_*.py"))
             if f"{name} " in (text := each.read_text(encoding="utf-8")) or f"{name}\n" in text]  # fmt: skip
    return TESTS.get(path, found)


def check(path: str, sample: int, seed: int, until: float) -> dict[str, object]:
    """Kill rate of one file, its survivors printed."""
    source, tests = (ROOT / path).read_text(encoding="utf-8"), tests_of(path)
    name, every = path.removesuffix(".py").replace("/", "."), mutants(source)
    began = time.monotonic()
    if not tests or outcome(name, source, tests, 600.0):
        return {"mutants": len(every), "tried": 0, "problem": "no tests, or they fail without a change"}
    limit = 10.0 + 5.0 * (time.monotonic() - began)
    chosen = random.Random(seed).sample(every, min(sample, len(every))) if sample else every
    killed = tried = 0
    for line, text, mutant in chosen:
        if time.monotonic() > until:
            break
        tried += 1
        dead = outcome(name, mutant, tests, limit) != 0
        killed += dead
        if not dead:
            print(f"{path}:{line}: {text}", flush=True)
    return {"mutants": len(every), "tried": tried, "killed": killed, "percent": round(100 * killed / max(tried, 1), 1)}


def main() -> None:
    """Measure the files and print the table as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=FILES, help="patterns from the root of the checkout")
    parser.add_argument("--sample", type=int, default=20, help="mutants a file, drawn by the seed; 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no mutant is started later (%(default)s)")
    options = parser.parse_args()
    os.chdir(ROOT)
    for library in LIBRARIES:
        importlib.import_module(library)
    until = time.monotonic() + 60.0 * options.minutes
    paths = sorted({str(each.relative_to(ROOT)) for pattern in options.files for each in ROOT.glob(pattern)})
    table = {
        path: check(path, options.sample, options.seed, until) for path in paths if not path.endswith("__init__.py")
    }
    tried, killed = (sum(int(row.get(key, 0)) for row in table.values()) for key in ("tried", "killed"))  # type: ignore[call-overload]
    print(json.dumps({"files": table, "tried": tried, "percent": round(100 * killed / max(tried, 1), 1)}))


if __name__ == "__main__":
    main()
