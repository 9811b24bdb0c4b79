"""From a benchmark's folder to a run: the Sacred experiment, its command line, the check of the data.

No heavy import: ``--help``, a refusal and ``--check-data`` of what needs none start neither torch nor MONAI.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mg3d.config_cli import Vocabulary, parse_command_line, run_request, run_words
from mg3d.config_sacred import Experiment, build_experiment
from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Benchmark
from mg3d.finetuning.config import FinetuneConfig, finetune_defaults, finetune_key_table, resolve_finetune_config

__all__ = ["compose_finetune_config", "run_benchmark"]

_BOOLEAN = re.compile(r"(?<==)(true|false)$")
CHECK_FLAG, CHECK_COMMAND = "--check-data", "check_data"
SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "max_epoch",
    "max_epochs": "max_epoch",
    "steps": "max_steps",
    "gpus": "num_gpus",
    "load_path": "weights",
    "pretrained": "weights",
    "vision_encoder": "encoder",
    "per_gpu_batchsize": "batch_size",
    "data_frac": "data_fraction",
    "exp_name": "run_name",
}

_HELP = """{name}: {summary}

  {program} with [NAMED_CONFIG ...] [KEY=VALUE ...]   prepare, train, evaluate, predict, report
  {program} --check-data with ...                     list everything that is wrong with the download
  {program} print_config with ...                     the composed config
  {program} check with ...                            only check the config
  {program} print_keys                                every key, its default, allowed values and meaning

A later named config wins over an earlier one, KEY=VALUE over both. A run's config.json may stand for a named config.
{usage}
Examples
  {program} with phantom
  {program} with data_root=DIR fold=0 weights=FILE encoder=swin_b
  {program} with data_root=DIR fold=0 weights=FILE scratch=True
  {program} with result/RUN/version_0/config.json resume=last

Named configs
{named}

Keys of this benchmark
{keys}
"""


def named_configs(benchmark: Benchmark) -> dict[str, tuple[str, dict[str, Any]]]:
    """Named config -> (meaning, keys): the benchmark's own, and ``phantom`` with what all phantom runs share."""
    place = f"data/downstream_phantoms/{benchmark.name}"
    shared = {
        "phantom": True,
        "data_root": place,
        "work_dir": f"{place}_work",
        "feature_size": 12,
        "num_workers": 0,
        "max_epoch": 2,
        "bootstrap_rounds": 200,
        "log_every_n_steps": 1,
    }
    found = {"phantom": ("small run on a synthetic data set in the published layout", shared)}
    for name, keys in benchmark.named_configs.items():
        meaning, before = found.get(name, (", ".join(f"{key}={value}" for key, value in keys.items()), {}))
        found[name] = (meaning, {**before, **dict(keys)})
    return found


def vocabulary(benchmark: Benchmark) -> Vocabulary:
    """The words of a benchmark's command line."""
    return Vocabulary(
        program=f"python downstream/{benchmark.name}/main.py",
        keys=lambda: finetune_defaults(benchmark),
        named=named_configs(benchmark),
        help_text=lambda: _help_text(benchmark),
        synonyms=SYNONYMS,
    )


def _help_text(benchmark: Benchmark) -> str:
    named = named_configs(benchmark)
    width = max(map(len, named))
    rows = [row for row in finetune_key_table(benchmark) if row[0] in (*benchmark.defaults, *benchmark.extra_keys)]
    own = "\n".join(f"  {name} = {default!r}   {meaning} ({allowed})" for name, default, allowed, meaning in rows)
    usage = [line.rstrip() for line in benchmark.usage.strip().splitlines()] or ["fine-tune and score"]
    return _HELP.format(
        name=benchmark.name,
        summary=usage[0],
        usage="\n".join(["", *usage[1:], ""]) if len(usage) > 1 else "",
        program=f"python downstream/{benchmark.name}/main.py",
        named="\n".join(f"  {name:{width}}  {meaning}" for name, (meaning, _) in named.items()),
        keys=own or "  none",
    )


def build_benchmark_experiment(benchmark: Benchmark) -> Experiment:
    """The Sacred experiment of a benchmark with its commands; ``train`` is the default one."""
    experiment = build_experiment(benchmark.name, finetune_defaults(benchmark), named_configs(benchmark))

    @experiment.config_hook
    def check_composed(config: dict[str, Any], command_name: str, logger: Any) -> dict[str, Any]:
        """Check the composed config before a command starts; hand back the values in their declared types."""
        resolved = resolve_finetune_config(config, benchmark).to_dict()
        return {key: value for key, value in resolved.items() if value != config[key]}

    @experiment.main
    def train(_config: dict[str, Any]) -> dict[str, Any]:
        """Prepare, train, evaluate, predict and report as the config says."""
        return _train(benchmark, _resolve(_config, benchmark))

    @experiment.command(unobserved=True)
    def check(_config: dict[str, Any]) -> FinetuneConfig:
        """Check the composed config and end; a bad word is refused with exit code 2."""
        return _resolve(_config, benchmark)

    @experiment.command(unobserved=True)
    def check_data(_config: dict[str, Any]) -> None:
        """List everything that is wrong with the data."""
        _check_data(benchmark, _resolve(_config, benchmark))

    @experiment.command(unobserved=True)
    def print_keys() -> None:
        """List every key with its default, its allowed values and its meaning."""
        for name, default, allowed, meaning in finetune_key_table(benchmark):
            print(f"{name} = {default!r}\n    {meaning} ({allowed})")

    return experiment


def _resolve(values: Mapping[str, Any], benchmark: Benchmark) -> FinetuneConfig:
    return resolve_finetune_config(copy.deepcopy(dict(values)), benchmark)


def compose_finetune_config(benchmark: Benchmark, words: Sequence[str]) -> FinetuneConfig:
    """The checked config of named configs and KEY=VALUE words, composed by Sacred without starting anything.

    Raises:
        ConfigError: a word is unknown, or of the wrong type or range.
    """
    experiment = build_benchmark_experiment(benchmark)
    line = ["check", *(["with", *_read_words(words)] if words else [])]
    request = parse_command_line(experiment, line, vocabulary(benchmark))
    config: FinetuneConfig = run_request(experiment, request)
    return config


def _check_data(benchmark: Benchmark, cfg: FinetuneConfig) -> None:
    _write_phantom(benchmark, cfg)
    problems = benchmark.check_data(cfg)
    if not problems:
        print(f"{benchmark.name}: nothing wrong with {cfg.data_root}")
        return
    print("\n".join(problems), file=sys.stderr)
    raise DataError(f"{len(problems)} problems in {cfg.data_root}", "mend them in any order, then check again")


def _write_phantom(benchmark: Benchmark, cfg: FinetuneConfig) -> None:
    if cfg.phantom:
        from mg3d.finetuning.preparation import write_phantom

        write_phantom(benchmark, cfg)


def _train(benchmark: Benchmark, cfg: FinetuneConfig) -> dict[str, Any]:
    from mg3d.training.environment import ensure_process_defaults

    if os.path.basename(sys.argv[0]) == "main.py":  # a process of its own, not a call from another program
        ensure_process_defaults(cfg.num_threads)  # may start this process again, so nothing is printed before it
    from mg3d.finetuning.run import run
    from mg3d.training import console

    console.configure_console()
    result = run(cfg, benchmark)
    console.print_result(result)
    return result


def _read_words(words: Sequence[str]) -> list[str]:
    """Words as Sacred reads them: typed true and false, ``--check-data`` anywhere stands for the command.

    ``resume_from=``, the key of pre-training that messages of the shared parts name, is ``resume=`` here.
    """
    typed = [_BOOLEAN.sub(lambda match: match[0].capitalize(), str(word)) for word in words if word != CHECK_FLAG]
    rest = [f"resume={word.partition('=')[2]}" if word.startswith("resume_from=") else word for word in typed]
    if len(rest) == len(words):
        return rest
    settings = rest[1:] if rest[:1] == ["with"] else rest
    return [CHECK_COMMAND, *(["with", *settings] if settings else [])]


def run_benchmark(benchmark: Benchmark, words: Sequence[str], name: str | None = None) -> int:
    """Run one command line of a benchmark.

    Args:
        benchmark: what is run.
        words: the command line without the program name.
        name: another name for folders and messages than the benchmark's own.

    Returns:
        The exit code: 0 fine, 1 a run failed, 2 bad input or config, 128 + n stopped by signal n.
    """
    if name is not None:
        benchmark = dataclasses.replace(benchmark, name=name)
    experiment = build_benchmark_experiment(benchmark)
    return run_words(experiment, lambda: parse_command_line(experiment, _read_words(words), vocabulary(benchmark)))
