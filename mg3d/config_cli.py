"""The command line in front of Sacred: refuses unknown, dead and planned words, then runs the experiment.

Sacred itself would accept a wrong type with a warning and answer an unknown key with a traceback. The words that an
experiment knows are a `Vocabulary`; pre-training's is here, that of a benchmark in `mg3d.finetuning.experiment`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import colorama
from docopt import DocoptExit, docopt

from mg3d.command_line import refusal_text
from mg3d.config_named import NAMED_CONFIGS
from mg3d.config_sacred import ConfigDict, Experiment
from mg3d.config_schema import MG3DConfig, config_defaults
from mg3d.config_status import (
    DEAD_KEYS,
    LATER_KEYS,
    NAMED_NOTICES,
    NO_EFFECT_KEYS,
    PLANNED_NAMED_CONFIGS,
    SYNONYMS,
    VALUE_NOTICES,
)
from mg3d.config_types import suggest
from mg3d.config_values import parse_updates, parse_value, read_config_file
from mg3d.errors import ConfigError, MG3DError
from mg3d.terminal import tolerate_any_encoding

__all__ = [
    "Request",
    "Vocabulary",
    "compose_config",
    "parse_command_line",
    "run_request",
    "run_words",
]

UNUSED_COMMANDS = ("print_dependencies", "save_config")
"""Commands of Sacred that have nothing to say here, or write a file that every run folder has."""
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
class Vocabulary:
    """The words an experiment knows.

    Attributes:
        program: how its command line begins, for messages.
        keys: default of every live key.
        named: named config -> (meaning, keys).
        help_text: what ``--help`` prints.
        planned: named configs of later rounds -> what brings them.
        dead: keys without effect -> what to write instead.
        later: keys of later rounds -> what brings them.
        no_effect: keys accepted without effect -> (the only value accepted, None for any; notice).
        synonyms: other spellings of keys.
        named_notices: named configs that are not what their name says -> notice.
        value_notices: (key, value) that is not what it says -> notice.
    """

    program: str
    keys: Callable[[], Mapping[str, Any]]
    named: Mapping[str, tuple[str, Mapping[str, Any]]]
    help_text: Callable[[], str]
    planned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    later: Mapping[str, str] = dataclasses.field(default_factory=dict)
    no_effect: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    named_notices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    value_notices: Mapping[tuple[str, Any], str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for: a command with overrides and named configs, or a help text to show."""

    command: str | None = None
    updates: dict[str, Any] = dataclasses.field(default_factory=dict)
    named: tuple[str, ...] = ()
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    notices: tuple[str, ...] = ()
    help_text: str = ""


def parse_command_line(experiment: Experiment, argv: Sequence[str], vocabulary: Vocabulary | None = None) -> Request:
    """Read and check a command line.

    Args:
        experiment: the Sacred experiment.
        argv: words after the program name.
        vocabulary: the words it knows; those of pre-training when None.

    Returns:
        The request; `Request.help_text` is set when only help was asked for.

    Raises:
        ConfigError: unreadable, or a key or named config that is unknown, dead or planned.
    """
    known = vocabulary or PRETRAINING
    words = [str(word) for word in argv]
    if any(word in ("-h", "--help") for word in words) or words[:1] == ["help"]:
        return Request(help_text=known.help_text())
    _refuse_flags(experiment, words, known)
    arguments = _split(experiment, words, known)
    commands = [name for name, _ in experiment.gather_commands() if name not in UNUSED_COMMANDS]
    command = arguments.get("COMMAND") or experiment.default_command
    if command not in commands:
        raise _unknown_command(str(command), commands, known)
    return _read_updates(command, arguments["UPDATE"], known)


def run_request(experiment: Experiment, request: Request) -> Any:
    """Run the request through Sacred and return what its command returned."""
    for name, content in request.files.items():
        experiment.named_configs[name] = ConfigDict(content)
    if str(request.command).startswith("print_"):
        colorama.init()  # no colour codes in a file or a pipe
    # --force: the checks of mg3d.config_schema replace Sacred's warnings about added keys and changed types.
    run = experiment.run(request.command, request.updates, request.named, {}, {}, {"--force": True})
    return run.result


def run_words(
    experiment: Experiment, read: Callable[[], Request], heed: Callable[[Request], object] | None = None
) -> int:
    """Read a command line, run it, and tell what is wrong with it.

    Args:
        experiment: the Sacred experiment.
        read: gives the request.
        heed: is shown the request before it is run.

    Returns:
        The exit code: 0 fine, 1 a run failed, 2 bad input or config, 128 + n stopped by signal n.
    """
    try:
        request = read()
        tolerate_any_encoding(colours=str(request.command).startswith("print_"))
        if request.help_text:
            print(request.help_text)
            return 0
        if heed is not None:
            heed(request)
        run_request(experiment, request)
    except MG3DError as error:
        # Every process of a job refuses the same config: one of them says so. What one rank meets alone, it tells.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(refusal_text(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def compose_config(experiment: Experiment, words: Sequence[str]) -> MG3DConfig:
    """The checked config of named configs and KEY=VALUE words, composed by Sacred without starting anything.

    Raises:
        ConfigError: a word is unknown, dead, planned, or of the wrong type or range.
    """
    config: MG3DConfig = run_request(experiment, parse_command_line(experiment, ["check", "with", *words]))
    return config


def _help_text() -> str:
    width = max(len(name) for name in NAMED_CONFIGS)
    return _HELP.format(named="\n".join(f"  {name:{width}}  {doc}" for name, (doc, _) in NAMED_CONFIGS.items()))


PRETRAINING = Vocabulary(
    program="python main.py",
    keys=config_defaults,
    named=NAMED_CONFIGS,
    help_text=_help_text,
    planned=PLANNED_NAMED_CONFIGS,
    dead=DEAD_KEYS,
    later=LATER_KEYS,
    no_effect=NO_EFFECT_KEYS,
    synonyms=SYNONYMS,
    named_notices=NAMED_NOTICES,
    value_notices=VALUE_NOTICES,
)


def _refuse_flags(experiment: Experiment, words: Sequence[str], known: Vocabulary) -> None:
    """Refuse Sacred's own flags: its observers would reach out to databases and clouds, the others do nothing here."""
    flags = dict(option.get_flags() for option in experiment.all_cli_options)
    for word in words:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            continue
        long = next((long for short, long in flags.items() if flag == long or flag.startswith(short)), "")
        what = f"Sacred's flag {long} is not used here" if long else "there is no such flag"
        remedy = f"leave it out; settings are KEY=VALUE, runs go to log_dir=, see {known.program} --help"
        raise ConfigError(f"{word}: {what}", remedy)


def _split(experiment: Experiment, words: list[str], known: Vocabulary) -> dict[str, Any]:
    usage = experiment.get_usage("main.py")[2]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            arguments: dict[str, Any] = docopt(usage, words, default_help=False)
    except DocoptExit as error:
        raise _unreadable(words, known) from error
    return arguments


def _unreadable(words: list[str], known: Vocabulary) -> ConfigError:
    settings = [word for word in words if not word.startswith("-") and word != "with"]
    mend = (
        f"write: {known.program} with {' '.join(settings)}"
        if settings
        else f"show the usage with: {known.program} --help"
    )
    return ConfigError(f"cannot read the command line: {' '.join(words)}", mend)


def _unknown_command(command: str, commands: list[str], known: Vocabulary) -> ConfigError:
    if "=" in command or command in known.named or command in known.planned:
        return ConfigError(f"{command} is not a command", f"write: {known.program} with {command}")
    near = suggest(command, commands)
    return ConfigError(
        f"{command}: there is no such command\n  allowed: {', '.join(commands)}",
        f"write: {known.program} {near or 'print_config'}",
    )


def _read_updates(command: str | None, updates: Sequence[str], known: Vocabulary) -> Request:
    accepted: list[str] = []
    named: list[str] = []
    files: dict[str, dict[str, Any]] = {}
    unused: list[tuple[str, Any]] = []
    for update in updates:
        path, sign, text = (part.strip() for part in update.partition("="))
        if sign and path in known.no_effect:
            unused.append((path, parse_value(path, text)))
        elif sign:
            _check_key(path, text, known)
            accepted.append(f"{path}={text}")
        elif path.endswith(".json"):
            files[f"config_file_{len(files)}"] = _read_file(path, known)
            named.append(f"config_file_{len(files) - 1}")
        elif path:
            _check_named(path, known)
            named.append(path)
    values = parse_updates(accepted)
    notices = _notices(unused, known) + _meanings(named, values, known)
    return Request(command, values, tuple(named), files, notices)


def _check_key(path: str, text: str, known: Vocabulary) -> None:
    """Refuse a key that is not live; ``a.b`` reaches into keys that are dictionaries."""
    root, _, inner = path.partition(".")
    defaults = known.keys()
    if root in known.dead or root in known.later:
        raise _not_live(root, f"{path}={text}", known)
    if root not in defaults:
        raise _unknown_key(path, text, list(defaults), known)
    if inner and not isinstance(defaults[root], dict):
        raise ConfigError(f"{path}={text}: {root} has no parts", f"write {root}={text}")


def _not_live(name: str, given: str, known: Vocabulary, allowed: str = "") -> ConfigError:
    if name in known.dead:
        return ConfigError(f"{given}: this key has no effect in the published code{allowed}", known.dead[name])
    return ConfigError(
        f"{given}: planned for a later round, with {known.later[name]}{allowed}", f"leave {name} out for now"
    )


def _unknown_key(path: str, text: str, keys: list[str], known: Vocabulary) -> ConfigError:
    near = suggest(path, keys, known.synonyms)
    return ConfigError(
        f"{path}={text}: there is no such key\n  allowed: the {len(keys)} keys that `{known.program} print_keys` lists"
        f"\n  nearest: {near or 'no key is spelled like it'}",
        f"write {near}={text}" if near else f"leave {path} out",
    )


def _check_named(name: str, known: Vocabulary) -> None:
    if name in known.planned:
        raise ConfigError(
            f"{name}: this named config is planned, {known.planned[name]}",
            f"use one of {', '.join(known.named)}",
        )
    if name not in known.named:
        near = suggest(name, [*known.named, *known.planned])
        raise ConfigError(
            f"{name}: there is no such named config\n  allowed: {', '.join(known.named)}"
            f"\n  nearest: {near or 'no named config is spelled like it'}",
            f"write {near}" if near else "a key needs a value: KEY=VALUE",
        )
    if os.path.isfile(name):  # Sacred would take the file for the config
        raise ConfigError(f"the file {name} in this folder hides the named config {name}", "rename the file")


def _read_file(path: str, known: Vocabulary) -> dict[str, Any]:
    """Keys of a run's ``config.json``."""
    content = read_config_file(path)
    for key, value in content.items():
        _check_key(str(key), str(value), known)
    return content


def _notices(unused: Sequence[tuple[str, Any]], known: Vocabulary) -> tuple[str, ...]:
    notices = []
    for name, value in unused:
        only, notice = known.no_effect[name]
        if only is not None and (isinstance(value, bool) or value != only):
            raise _not_live(name, f"{name}={value!r}", known, f"\n  allowed: {only}")
        if notice:
            notices.append(f"notice: {name}={value}: {notice}")
    return tuple(notices)


def _meanings(named: Sequence[str], values: Mapping[str, Any], known: Vocabulary) -> tuple[str, ...]:
    """Notices on accepted words that mean something else here than in the published code."""
    words = [f"notice: {name}: {known.named_notices[name]}" for name in named if name in known.named_notices]
    plain = ((key, value) for key, value in values.items() if isinstance(value, int | str))
    odd = [pair for pair in plain if pair in known.value_notices]
    return (*words, *(f"notice: {key}={value}: {known.value_notices[key, value]}" for key, value in odd))
