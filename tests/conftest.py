"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the golden tensors and the real test data (MG3D_SHARED, or the sibling folder ``shared``)."""
    folder = Path(os.environ.get("MG3D_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.fail(f"{folder} holds no golden/: set MG3D_SHARED to the folder with the reference data")
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    """Folder of the recorded reference tensors."""
    return shared_dir / "golden" / "v1"


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
