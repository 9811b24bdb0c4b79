"""The command line in front of Sacred: refuses unknown, dead and planned words, then runs the experiment.

Sacred itself would accept a wrong type with a warning and answer an unknown key with a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import colorama
from docopt import DocoptExit, docopt
from sacred import Experiment
from sacred.arg_parser import get_config_updates
from sacred.config import ConfigDict

from mg3d.config_named import NAMED_CONFIGS
from mg3d.config_schema import MG3DConfig, config_defaults
from mg3d.config_status import (
    DEAD_KEYS,
    LATER_KEYS,
    NO_EFFECT_KEYS,
    PLANNED_NAMED_CONFIGS,
    SYNONYMS,
)
from mg3d.config_types import suggest
from mg3d.errors import ConfigError, MG3DError

__all__ = ["Request", "compose_config", "parse_command_line", "refusal_text", "run_request"]

_HELP = """MG-3D pre-training

  python main.py with [NAMED_CONFIG ...] [KEY=VALUE ...]   train, resume or test
  python main.py print_config with ...                     the composed config
  python main.py check with ...                            only check the config
  python main.py print_keys                                every key, its default, allowed values and meaning
  python main.py print_named_configs                       every named config

A later named config wins over an earlier one, KEY=VALUE over both. A run's config.json may stand for a named config.

Examples
  python main.py with task_pretrain_mg3d data_root=DIR num_gpus=4 num_nodes=1 per_gpu_batchsize=4
  python main.py with task_pretrain_mg3d demo
  python main.py with task_pretrain_mg3d resume_from=result/RUN/version_0/checkpoints/last.ckpt

Named configs
{named}
"""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for: a command with overrides and named configs, or a help text to show."""

    command: str | None = None
    updates: dict[str, Any] = dataclasses.field(default_factory=dict)
    named: tuple[str, ...] = ()
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    notices: tuple[str, ...] = ()
    help_text: str = ""


def parse_command_line(experiment: Experiment, argv: Sequence[str]) -> Request:
    """Read and check a command line.

    Args:
        experiment: the Sacred experiment.
        argv: words after the program name.

    Returns:
        The request; `Request.help_text` is set when only help was asked for.

    Raises:
        ConfigError: unreadable, or a key or named config that is unknown, dead or planned.
    """
    words = [str(word) for word in argv]
    if any(word in ("-h", "--help") for word in words) or words[:1] == ["help"]:
        return Request(help_text=_help_text())
    arguments = _split(experiment, words)
    commands = dict(experiment.gather_commands())
    command = arguments.get("COMMAND") or experiment.default_command
    if command not in commands:
        raise _unknown_command(str(command), list(commands))
    return _read_updates(command, arguments["UPDATE"], arguments)


def run_request(experiment: Experiment, request: Request) -> Any:
    """Run the request through Sacred and return what its command returned."""
    for name, content in request.files.items():
        experiment.named_configs[name] = ConfigDict(content)
    if str(request.command).startswith("print_"):
        colorama.init()  # no colour codes in a file or a pipe
    # --force: the checks of mg3d.config_schema replace Sacred's warnings about added keys and changed types.
    options = {key: value for key, value in request.options.items() if key.startswith("-")} | {"--force": True}
    run = experiment.run(request.command, request.updates, request.named, {}, {}, options)
    return run.result


def compose_config(experiment: Experiment, words: Sequence[str]) -> MG3DConfig:
    """The checked config of named configs and KEY=VALUE words, composed by Sacred without starting anything.

    Raises:
        ConfigError: a word is unknown, dead, planned, or of the wrong type or range.
    """
    config: MG3DConfig = run_request(experiment, parse_command_line(experiment, ["check", "with", *words]))
    return config


def refusal_text(error: MG3DError, max_lines: int = 5) -> str:
    """An error as at most ``max_lines`` lines that end with the mend."""
    lines = [line[:400] for line in f"error: {error}".splitlines() if line.strip()]
    return "\n".join(lines if len(lines) <= max_lines else [*lines[: max_lines - 1], lines[-1]])


def _help_text() -> str:
    width = max(len(name) for name in NAMED_CONFIGS)
    return _HELP.format(named="\n".join(f"  {name:{width}}  {doc}" for name, (doc, _) in NAMED_CONFIGS.items()))


def _split(experiment: Experiment, words: list[str]) -> dict[str, Any]:
    usage = experiment.get_usage("main.py")[2]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            arguments: dict[str, Any] = docopt(usage, words, default_help=False)
    except DocoptExit as error:
        raise _unreadable(words) from error
    return arguments


def _unreadable(words: list[str]) -> ConfigError:
    settings = [word for word in words if not word.startswith("-") and word != "with"]
    mend = (
        f"write: python main.py with {' '.join(settings)}" if settings else "show the usage with: python main.py --help"
    )
    return ConfigError(f"cannot read the command line: {' '.join(words)}", mend)


def _unknown_command(command: str, commands: list[str]) -> ConfigError:
    if "=" in command or command in NAMED_CONFIGS or command in PLANNED_NAMED_CONFIGS:
        return ConfigError(f"{command} is not a command", f"write: python main.py with {command}")
    near = suggest(command, commands)
    return ConfigError(
        f"{command}: there is no such command\n  allowed: {', '.join(commands)}",
        f"write: python main.py {near or 'print_config'}",
    )


def _read_updates(command: str | None, updates: Sequence[str], arguments: dict[str, Any]) -> Request:
    accepted: list[str] = []
    named: list[str] = []
    files: dict[str, dict[str, Any]] = {}
    unused: list[tuple[str, Any]] = []
    for update in updates:
        path, sign, text = (part.strip() for part in update.partition("="))
        if sign and path in NO_EFFECT_KEYS:
            unused.append((path, get_config_updates([f"{path}={text}"])[0][path]))
        elif sign:
            _check_key(path, text)
            accepted.append(f"{path}={text}")
        elif path.endswith(".json"):
            files[f"config_file_{len(files)}"] = _read_file(path)
            named.append(f"config_file_{len(files) - 1}")
        elif path:
            _check_named(path)
            named.append(path)
    try:
        values = get_config_updates(accepted)[0]
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError("a key is given both whole and in parts", "give the whole dictionary or its parts") from error
    return Request(command, values, tuple(named), files, arguments, _notices(unused))


def _check_key(path: str, text: str) -> None:
    """Refuse a key that is not live; ``a.b`` reaches into keys that are dictionaries."""
    root, _, inner = path.partition(".")
    defaults = config_defaults()
    if root in DEAD_KEYS or root in LATER_KEYS:
        raise _not_live(root, f"{path}={text}")
    if root not in defaults:
        raise _unknown_key(path, text, list(defaults))
    if inner and not isinstance(defaults[root], dict):
        raise ConfigError(f"{path}={text}: {root} has no parts", f"write {root}={text}")


def _not_live(name: str, given: str, allowed: str = "") -> ConfigError:
    if name in DEAD_KEYS:
        return ConfigError(f"{given}: this key has no effect in the published code{allowed}", DEAD_KEYS[name])
    return ConfigError(
        f"{given}: planned for a later round, with {LATER_KEYS[name]}{allowed}", f"leave {name} out for now"
    )


def _unknown_key(path: str, text: str, keys: list[str]) -> ConfigError:
    near = suggest(path, keys, SYNONYMS)
    return ConfigError(
        f"{path}={text}: there is no such key\n  allowed: the {len(keys)} keys that `python main.py print_keys` lists"
        f"\n  nearest: {near or 'no key is spelled like it'}",
        f"write {near}={text}" if near else f"leave {path} out",
    )


def _check_named(name: str) -> None:
    if name in PLANNED_NAMED_CONFIGS:
        raise ConfigError(
            f"{name}: this named config is planned, {PLANNED_NAMED_CONFIGS[name]}",
            f"use one of {', '.join(NAMED_CONFIGS)}",
        )
    if name not in NAMED_CONFIGS:
        near = suggest(name, [*NAMED_CONFIGS, *PLANNED_NAMED_CONFIGS])
        raise ConfigError(
            f"{name}: there is no such named config\n  allowed: {', '.join(NAMED_CONFIGS)}"
            f"\n  nearest: {near or 'no named config is spelled like it'}",
            f"write {near}" if near else "a key needs a value: KEY=VALUE",
        )
    if os.path.isfile(name):  # Sacred would take the file for the config
        raise ConfigError(f"the file {name} in this folder hides the named config {name}", "rename the file")


def _read_file(path: str) -> dict[str, Any]:
    """Keys of a run's ``config.json``, read as plain JSON (Sacred's own reader would rebuild arbitrary objects)."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as a config: {error}", "give the config.json of a run folder"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no dictionary of keys", "give the config.json of a run folder")
    for key, value in content.items():
        _check_key(str(key), str(value))
    return content


def _notices(unused: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    notices = []
    for name, value in unused:
        only, notice = NO_EFFECT_KEYS[name]
        if only is not None and (isinstance(value, bool) or value != only):
            raise _not_live(name, f"{name}={value!r}", f"\n  allowed: {only}")
        if notice:
            notices.append(f"notice: {name}={value}: {notice}")
    return tuple(notices)
