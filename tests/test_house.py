"""Rules of the house that a machine can check: layout, imports, safe loading, lint and types."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP_LEVEL = {"mg3d", "prepro", "data", "run_scripts", "tools", "downstream", "tests", "benchmarks", "docs", "main.py"}
PROJECT_FILES = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "pyproject.toml"}
FORBIDDEN_IMPORTS = {
    "mg3d/datasets": ("mg3d.models", "mg3d.datamodules", "mg3d.config", "pytorch_lightning"),
    "mg3d/datamodules": ("mg3d.models", "mg3d.training", "mg3d.evaluation"),
    "mg3d/models": ("mg3d.datasets", "mg3d.datamodules", "mg3d.training"),
    "mg3d/metrics": ("mg3d.models", "mg3d.datasets", "mg3d.datamodules", "mg3d.config"),
}
UNSAFE = re.compile(
    r"\btext\s*=\s*True|weights_only\s*=\s*False|pickle\.loads?\(|yaml\.load\(|shell\s*=\s*True|os\.system\(|(?<![.\w])eval\("
)
PICKLERS = ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "jsonpickle")
RUNS_WHAT_IT_READS = {
    *("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.hub.load", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle", "subprocess.getoutput"),
}
PRIVATE_PLACE = re.compile(r"(?<![\w.$}>])/(home|scratch|root|work|mnt)/\w")


def tracked(repository: Path, *patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=repository, capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert listed, f"no tracked file matches {patterns}: the test would pass without having looked"
    return [repository / line for line in listed.splitlines()]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_top_level_holds_only_what_belongs_there(repository: Path) -> None:
    names = {path.relative_to(repository).parts[0] for path in tracked(repository)}
    others = {name for name in names - TOP_LEVEL - PROJECT_FILES if not name.startswith((".", "requirements"))}
    assert others == set()


def test_imports_point_one_way(repository: Path) -> None:
    wrong = []
    for folder, forbidden in FORBIDDEN_IMPORTS.items():
        for path in tracked(repository, f"{folder}/*.py"):
            wrong += [f"{path.name}: {name}" for name in imported(path) if name.startswith(forbidden)]
    assert [entry for entry in wrong if not entry.startswith("mg3d_module.py")] == []


def test_no_unsafe_call_no_private_place_no_long_file(repository: Path) -> None:
    paths = [path for path in tracked(repository, "*.py", "*.sh") if "tests" not in path.relative_to(repository).parts]
    texts = {str(path.relative_to(repository)): path.read_text(encoding="utf-8") for path in paths}
    assert {"main.py", "mg3d/errors.py", "run_scripts/test.sh"} <= texts.keys()
    for name, text in texts.items():
        assert not UNSAFE.search(text), name
        assert not PRIVATE_PLACE.search(text), name
        assert len(text.splitlines()) <= 500, name


@pytest.mark.parametrize("line", ["pickle.load(f)", "x = eval(a)", "os.system(a)", "run(a, shell=True)", "text=True"])
def test_the_patterns_of_unsafe_calls_and_private_places_match_what_they_mean(line: str) -> None:
    assert UNSAFE.search(line) and not UNSAFE.search("model.eval()")
    assert PRIVATE_PLACE.search('open("/home/me/x")') and not PRIVATE_PLACE.search("/dev/shm/x")


def unsafe_calls(path: Path) -> list[str]:
    """Calls of a file that could run what a data or weights file says, by their place."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        unsafe = name in RUNS_WHAT_IT_READS or name.split(".")[0] in PICKLERS
        unsafe |= name.endswith("torch.load") and given.get("weights_only") != "True"
        unsafe |= given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False"
        unsafe |= given.get("trust_remote_code", "False") != "False"
        if unsafe:
            found.append(f"{path.name}:{node.lineno} {name}")
    return found


def test_nothing_that_is_read_is_run(repository: Path) -> None:
    shipped = [path for path in tracked(repository, "*.py") if "tests" not in path.relative_to(repository).parts]
    assert len(shipped) > 300
    assert [call for path in shipped for call in unsafe_calls(path)] == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "pickle.load(stream)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "torch.hub.load(name)",
    ],
)
def test_the_search_for_unsafe_calls_finds_them(tmp_path: Path, code: str) -> None:
    (tmp_path / "a.py").write_text(code)
    assert len(unsafe_calls(tmp_path / "a.py")) == 1


def test_tracked_files_are_small(repository: Path) -> None:
    """The recorded values may be larger; what may lie there is listed with its digest (tests/reference)."""
    recorded = repository / "tests" / "reference"
    files = [path for path in tracked(repository) if recorded not in path.parents]
    assert [path.name for path in files if path.stat().st_size > 500_000] == []


def test_the_recorded_files_are_the_listed_ones(repository: Path) -> None:
    folder = repository / "tests" / "reference"
    listed = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text("utf-8").splitlines())
    there = {str(path.relative_to(folder)) for path in tracked(repository, "tests/reference/*/*")}
    assert there == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
"""A test as ``docs/reliability.md`` names it."""


def test_every_goal_names_its_tests_and_every_named_test_exists(repository: Path) -> None:
    text = (repository / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = {int(found[1]): found[2] for found in re.finditer(r"^\| (\d+) \|(.+)\|$", text, re.MULTILINE)}
    assert sorted(rows) == list(range(1, 41))
    assert [goal for goal, row in rows.items() if not NAMED_TEST.search(row)] == []
    assert text.count("::") == len(NAMED_TEST.findall(text)) + 1, (
        "a name that is no `file::test` (one explains the form)"
    )
    there: dict[str, set[str]] = {}
    for file in {file for file, _ in NAMED_TEST.findall(text) if (repository / file).is_file()}:
        nodes = ast.walk(ast.parse((repository / file).read_text(encoding="utf-8")))
        there[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert [f"{file}::{name}" for file, name in NAMED_TEST.findall(text) if name not in there.get(file, set())] == []


def test_lint(repository: Path) -> None:
    for words in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words], cwd=repository, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_types(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "mg3d", "prepro"],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
