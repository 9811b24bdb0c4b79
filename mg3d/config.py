"""The Sacred experiment ``mg3d``: every default, every named config, and the check of the composed result.

A key on the command line beats a named config, which beats the default. The composed dictionary goes through
`mg3d.config_schema.resolve_config` before anything else sees it. Importing this file imports neither torch nor MONAI.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

with warnings.catch_warnings():  # sacred asks setuptools for pkg_resources, which announces its own removal
    warnings.simplefilter("ignore")
    from sacred import SETTINGS, Experiment
    from sacred.config import ConfigDict

from mg3d.config_named import NAMED_CONFIGS
from mg3d.config_schema import MG3DConfig, config_defaults, key_table, resolve_config

__all__ = ["ex"]

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


def _build_experiment() -> Experiment:
    experiment = Experiment("mg3d", save_git_info=False)
    quiet = logging.getLogger("mg3d.sacred")
    quiet.setLevel(logging.CRITICAL)
    experiment.logger = quiet  # type: ignore[assignment]  # Sacred declares it as None
    experiment.configurations.append(_Keys(config_defaults()))
    for name, (meaning, keys) in NAMED_CONFIGS.items():
        experiment.named_configs[name] = _Keys(keys)
        experiment.named_configs[name].__doc__ = meaning
    return experiment


ex = _build_experiment()


@ex.config_hook
def check_composed(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """Check the composed config before a command starts and hand back the values that follow from others."""
    resolved = resolve_config(config).to_dict()
    return {key: value for key, value in resolved.items() if value != config[key]}


@ex.command(unobserved=True)
def check(_config: dict[str, Any]) -> MG3DConfig:
    """Check the composed config and end; a bad word is refused with exit code 2."""
    return resolve_config(copy.deepcopy(_config))


@ex.command(unobserved=True)
def print_keys() -> None:
    """List every key with its default, its allowed values and its meaning."""
    rows = (f"{name} = {default!r}\n    {meaning} ({allowed})" for name, default, allowed, meaning in key_table())
    print("\n".join(rows))
