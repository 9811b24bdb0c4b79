"""A Sacred experiment that only composes configs: it observes, captures and prints nothing of its own."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

with warnings.catch_warnings():  # sacred asks setuptools for pkg_resources, which announces its own removal
    warnings.simplefilter("ignore")
    from sacred import SETTINGS, Experiment
    from sacred.config import ConfigDict

__all__ = ["ConfigDict", "Experiment", "build_experiment"]

# Sacred observes nothing here: run folders, logs and checkpoints are written by mg3d.training.
SETTINGS.CAPTURE_MODE = "no"
SETTINGS.DISCOVER_SOURCES = "none"
SETTINGS.DISCOVER_DEPENDENCIES = "none"
SETTINGS.HOST_INFO.INCLUDE_CPU_INFO = False
SETTINGS.HOST_INFO.INCLUDE_GPU_INFO = False
SETTINGS.DEFAULT_BEAT_INTERVAL = 0


class _Keys(ConfigDict):
    """Keys that every run gets a copy of: Sacred merges into the dictionaries it is given."""

    def __call__(self, fixed: Any = None, preset: Any = None, fallback: Any = None) -> Any:
        return ConfigDict(copy.deepcopy(self._conf))(fixed, preset, fallback)


def build_experiment(
    name: str, defaults: Mapping[str, Any], named: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> Experiment:
    """An experiment of default keys and named configs, without commands.

    Args:
        name: its name.
        defaults: key -> default, plain JSON types.
        named: named config -> (meaning, keys).
    """
    experiment = Experiment(name, save_git_info=False)
    quiet = logging.getLogger("mg3d.sacred")
    quiet.setLevel(logging.CRITICAL)
    experiment.logger = quiet  # type: ignore[assignment]  # Sacred declares it as None
    experiment.configurations.append(_Keys(dict(defaults)))
    for config, (meaning, keys) in named.items():
        experiment.named_configs[config] = _Keys(dict(keys))
        experiment.named_configs[config].__doc__ = meaning
    return experiment
