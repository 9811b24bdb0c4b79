"""No test needs anything outside the checkout but the marked ones, which are left out where their folder is absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LISTING = """
import json, os, pathlib

def pytest_collection_finish(session):
    found = {
        item.nodeid: [*item.fixturenames, *(mark.name for mark in item.iter_markers())]
        for item in session.items if hasattr(item, "fixturenames")
    }
    pathlib.Path(os.environ["LISTING"]).write_text(json.dumps(found), encoding="utf-8")
"""
FOUR = """
import pytest

@pytest.fixture
def through_another(shared_dir):
    return shared_dir

@pytest.mark.realdata
def test_marked(shared_dir):
    assert (shared_dir / "data").is_dir()

def test_plain(golden_dir):
    pass

@pytest.mark.parametrize("name", ["made", pytest.param("real", marks=pytest.mark.realdata)])
def test_asks_late(name, request):
    if name == "real":
        request.getfixturevalue("shared_dir")
"""
UNMARKED = "\ndef test_unmarked(through_another):\n    pass\n"
LATE = '\ndef test_unmarked_and_late(request):\n    request.getfixturevalue("shared_dir")\n'


def run_pytest(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MG3D_SHARED", "PYTEST_"))}
    return subprocess.run(
        command, cwd=folder, env=inherited | environ, capture_output=True, encoding="utf-8", timeout=500, check=False
    )


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """A checkout of the fixtures and four tests, with nothing beside it."""
    root = tmp_path / "parent" / "checkout"
    (root / "tests").mkdir(parents=True)
    shutil.copy(repository / "pyproject.toml", root)
    shutil.copy(repository / "tests" / "conftest.py", root / "tests")
    (root / "tests" / "test_four.py").write_text(FOUR, encoding="utf-8")
    return root


@pytest.mark.slow
def test_the_suite_needs_nothing_outside_the_checkout(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "listing.py").write_text(LISTING, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(repository)])
    places = {"MG3D_SHARED": "", "LISTING": str(tmp_path / "found.json"), "PYTHONPATH": paths}
    done = run_pytest(repository, "--collect-only", "-p", "listing", **places)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert len(found) > 2500
    assert [name for name, needed in found.items() if {"shared_dir", "realdata"} & set(needed)] == []
    assert re.match(r"\d\d+ realdata tests left out", done.stdout.splitlines()[-1])


def test_only_one_place_looks_for_the_outside_folder(repository: Path) -> None:
    looks = re.compile(r"MG3D_SHARED|\.\./shared|/\s*\"shared\"|[\"']/?\S*/shared/")
    allowed = {repository / "tests" / "conftest.py", Path(__file__).resolve()}
    for path in sorted({*repository.glob("tests/**/*.py"), *repository.glob("tools/**/*.py")} - allowed):
        assert not looks.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(("workers", "hidden"), [((), {}), (("-n", "2"), {"MG3D_SHARED": ""})])
def test_marked_tests_are_left_out_and_counted_last(
    checkout: Path, workers: tuple[str, ...], hidden: dict[str, str]
) -> None:
    done = run_pytest(checkout, *workers, **hidden)
    assert done.returncode == 0 and "2 passed" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 realdata tests left out: they need real scans")
    assert run_pytest(checkout, "-m", "realdata", **hidden).returncode == 5  # nothing ran is no success
    alone = run_pytest(checkout, "-k", "plain", **hidden)
    assert alone.returncode == 0 and "left out" not in alone.stdout  # only what would have run is counted


def test_marked_tests_run_where_the_folder_is(checkout: Path) -> None:
    (checkout.parent / "shared" / "data").mkdir(parents=True)
    done = run_pytest(checkout)
    assert done.returncode == 0 and "4 passed" in done.stdout and "left out" not in done.stdout
    elsewhere = checkout.parent.rename(checkout.parent.with_name("moved")) / "shared"
    named = run_pytest(elsewhere.parent / "checkout", MG3D_SHARED=str(elsewhere))
    assert named.returncode == 0 and "4 passed" in named.stdout


def test_a_wrong_place_is_an_error(checkout: Path, tmp_path: Path) -> None:
    done = run_pytest(checkout, MG3D_SHARED=str(tmp_path / "nowhere"))
    assert done.returncode == 4 and "nowhere" in done.stderr and "INTERNALERROR" not in done.stdout + done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_an_unmarked_test_that_needs_the_folder_is_refused(checkout: Path, there: bool) -> None:
    if there:
        (checkout.parent / "shared" / "data").mkdir(parents=True)
    (checkout / "tests" / "test_four.py").write_text(FOUR + UNMARKED, encoding="utf-8")
    done = run_pytest(checkout, "-k", "plain")
    assert done.returncode == 4 and "test_four.py::test_unmarked" in done.stderr
    (checkout / "tests" / "test_four.py").write_text(FOUR + LATE, encoding="utf-8")
    done = run_pytest(checkout)
    assert done.returncode == 1 and "marked realdata" in done.stdout
