"""Train, score and use the classifier of reports: ``python downstream/CT-RATE/text_classifier.py --help``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.finetuning.text_labels.command import main  # noqa: E402 - the lines above make it importable

if __name__ == "__main__":
    raise SystemExit(main())
