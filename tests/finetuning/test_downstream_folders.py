"""Rules of the folders under downstream/: small, nothing copied, no device named, and every one starts anywhere."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MAINS = sorted((REPOSITORY / "downstream").glob("*/main.py"))
MAX_LINES, MAX_COPIED = 500, 5
DEVICE = re.compile(r"\.cuda\(|cuda:\d|device\s*=\s*[\"'](cuda|gpu)|CUDA_VISIBLE_DEVICES\s*=")
WIRING = re.compile(r"\w+=\w+,")
ABSOLUTE = re.compile(r"[\"'](/[a-z]+){2,}|[\"'][A-Z]:\\\\")


def sources(folder: Path) -> list[Path]:
    """Python files of a folder."""
    return sorted(folder.rglob("*.py"))


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that say something: no blank line, comment, import, docstring or ``name=name,``."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or documented:
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    said = ((number, line) for number, line in numbered if line and line[0] != "#" and not WIRING.fullmatch(line))
    return [(number, line) for number, line in said if number not in left_out]


def test_folders_are_there() -> None:
    names = {path.parent.name for path in MAINS}
    assert {"ACDC", "Covid19_20", "MSD", "Luna16", "cc-ccii", "stoic2021"} <= names


@pytest.mark.parametrize("main", MAINS, ids=lambda path: path.parent.name)
def test_a_folder_is_small_and_says_how_it_is_used(main: Path) -> None:
    folder = main.parent
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder)) <= MAX_LINES
    assert len(main.read_text(encoding="utf-8").splitlines()) <= 20
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert f"downstream/{folder.name}/main.py" in page and "--check-data" in page
    assert f"[{folder.name}]" in (folder.parent / "README.md").read_text(encoding="utf-8")


def test_nothing_is_copied_from_folder_to_folder() -> None:
    seen: dict[tuple[str, ...], Path] = {}
    copied = []
    for main in MAINS:
        own: dict[tuple[str, ...], Path] = {}
        for path in sources(main.parent):
            lines = code_lines(path)
            for start in range(len(lines) - MAX_COPIED):
                block = tuple(line for _, line in lines[start : start + MAX_COPIED + 1])
                if block in seen:
                    copied.append(f"{path.relative_to(REPOSITORY)}:{lines[start][0]} as in {seen[block]}")
                own[block] = path.relative_to(REPOSITORY)
        seen |= own
    assert copied == []


def test_no_device_and_no_absolute_path_is_named() -> None:
    folders = ("downstream", "mg3d/finetuning", "mg3d/models/finetune", "mg3d/phantoms/downstream")
    paths = itertools.chain.from_iterable(sources(REPOSITORY / folder) for folder in folders)
    wrong = []
    for path in paths:
        for number, line in code_lines(path):
            if DEVICE.search(line) or ABSOLUTE.search(line):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{number}: {line}")
    assert wrong == []


@pytest.mark.parametrize("main", MAINS, ids=lambda path: path.parent.name)
def test_help_is_shown_from_any_place_without_the_heavy_libraries(main: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(main), "--help"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "with phantom" in done.stdout and "--check-data" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "monai", "pytorch_lightning"}


def test_run_all_shows_its_help_from_any_place(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(REPOSITORY / "downstream" / "run_all.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0 and "--array" in done.stdout
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {"torch", "monai"}
