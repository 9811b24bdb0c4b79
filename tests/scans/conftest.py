"""Let these tests use the scan builders of the packing tests."""

from __future__ import annotations

import sys
from pathlib import Path

BUILDERS = Path(__file__).resolve().parents[1] / "prepro"
if str(BUILDERS) not in sys.path:
    sys.path.insert(0, str(BUILDERS))
