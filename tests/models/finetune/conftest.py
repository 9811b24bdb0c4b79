"""Labelled images and weights files of other folders of tests."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS / "datasets"), str(TESTS / "models")]
