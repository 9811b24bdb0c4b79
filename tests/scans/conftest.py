"""Let these tests use the scan builders of the packing tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BUILDERS = Path(__file__).resolve().parents[1] / "prepro"
if str(BUILDERS) not in sys.path:
    sys.path.insert(0, str(BUILDERS))


@pytest.fixture
def scan_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The scan that a test is given: one that is made here, by its suffix, or a real one (marked ``realdata``)."""
    from scan_files import made_scan

    name = str(request.param)
    return made_scan(tmp_path / name) if name.startswith("made") else request.getfixturevalue("shared_dir") / name
