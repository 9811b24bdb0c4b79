"""The Sacred experiment ``mg3d``: every default, every named config, and the check of the composed result.

A key on the command line beats a named config, which beats the default. The composed dictionary goes through
`mg3d.config_schema.resolve_config` before anything else sees it. Importing this file imports neither torch nor MONAI.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from mg3d.config_named import NAMED_CONFIGS
from mg3d.config_sacred import build_experiment
from mg3d.config_schema import MG3DConfig, config_defaults, key_table, resolve_config

__all__ = ["ex"]

ex = build_experiment("mg3d", config_defaults(), NAMED_CONFIGS)


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
