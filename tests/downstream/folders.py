"""Import ``data.py`` of a benchmark's folder as its ``main.py`` does: every folder has a module of that name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mg3d.finetuning.config import FinetuneConfig, resolve_finetune_config

DOWNSTREAM = Path(__file__).resolve().parents[2] / "downstream"
OWN_NAMES = ("data", "prepare")


def load_folder(name: str, module: str = "data") -> ModuleType:
    """A module of a benchmark's folder."""
    folder = str(DOWNSTREAM / name)
    before = {key: sys.modules.pop(key) for key in OWN_NAMES if key in sys.modules}
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)
        for key in OWN_NAMES:
            sys.modules.pop(key, None)
        sys.modules.update(before)


def config(benchmark: Any, **keys: Any) -> FinetuneConfig:
    """The checked config of a benchmark with some keys."""
    return resolve_finetune_config(keys, benchmark)
