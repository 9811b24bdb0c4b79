"""The typed config of a fine-tuning run: every key with meaning, type, range and default. No heavy import.

Keys of one benchmark alone (`Benchmark.extra_keys`) are written like the others and end up in `FinetuneConfig.extra`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d.config_types import check_value, describe, plain, setting, suggest
from mg3d.errors import ConfigError
from mg3d.finetuning.config_rules import check_finetune_config

if typing.TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Benchmark

__all__ = ["STAGES", "FinetuneConfig", "finetune_defaults", "finetune_key_table", "resolve_finetune_config"]

STAGES = ("prepare", "train", "evaluate", "predict", "report")
ENCODERS = ("swin_b", "swin_l", "unet", "unet_pcrlv2", "nnunet", "nnunet_resenc")
PRECISIONS = (16, 32, "bf16")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """One checked configuration; build it with `resolve_finetune_config`. Lists are tuples."""

    # Run
    benchmark: str = setting("", "name of the benchmark; set by its folder")
    protocol: str = setting(
        "clean", "clean: sound splits and metrics; reference: the published behaviour", choices=["clean", "reference"]
    )
    stages: tuple[str, ...] = setting(list(STAGES), "what is done, in this order", choices=STAGES)
    seed: int = setting(0, "seeds python, numpy, torch, loader workers, splits and fractions", low=0, high=2**32 - 1)
    log_dir: str = setting("result", "folder that receives one folder a run", path=True)
    run_name: str = setting("", "first part of the run folder's name; empty: made from benchmark, encoder and mode")
    resume: str = setting("", "last, a run folder or a checkpoint of an interrupted run to go on from", path=True)
    resume_weights_only: bool = setting(
        False, "with resume: start a new optimisation from the checkpoint's weights, with any other keys"
    )
    resume_allow: tuple[str, ...] = setting(
        [], "with resume: keys (also data, world_size) that may differ from the checkpoint; then it is not exact"
    )
    log_every_n_steps: int = setting(10, "optimizer steps between two log lines", low=1)
    deterministic: bool = setting(True, "ask torch for deterministic algorithms (warn where none exists)")
    num_threads: int = setting(0, "CPU threads of torch a process; 0 leaves torch's choice", low=0, high=1024)
    fast_dev_run: bool | int = setting(False, "True: one batch of each phase; an integer: that many", low=0)

    # Data
    data_root: str = setting("", "folder of the download; empty: data/downstream/<benchmark>", path=True)
    work_dir: str = setting(
        "", "folder of prepared data and caches; empty: data/downstream_work/<benchmark>", path=True
    )
    phantom: bool = setting(False, "write the benchmark's phantom data set to data_root when that is empty")
    phantom_seed: int = setting(0, "seed of the phantom data set", low=0)
    fold: int = setting(0, "fold that is held out, from 0", low=0)
    num_folds: int = setting(5, "folds", low=2, high=100)
    data_fraction: float = setting(1.0, "share of the training patients that is used, e.g. 0.01, 0.1", above=0, high=1)
    shuffle_labels: bool = setting(False, "control: train on labels permuted over the patients")
    full_check: bool = setting(False, "--check-data also reads every image to its last byte")
    num_workers: int = setting(2, "loader processes a rank", low=0, high=256)
    cache: str = setting("none", "where deterministic preprocessing is kept", choices=["none", "memory", "disk"])
    on_bad_sample: str = setting(
        "raise", "what a case that cannot be read does to the run: stop it, or be left out", choices=["raise", "skip"]
    )
    max_bad_fraction: float = setting(0.05, "on_bad_sample=skip: most cases left out, as a share", low=0, high=1)
    axis_order: str = setting(
        "zyx", "array axes the network sees in classification (zyx as in pre-training)", choices=["zyx", "xyz", "zxy"]
    )
    augment: bool = setting(True, "random changes of training images; False trains without any")

    # Model
    encoder: str = setting("swin_b", "3-D image encoder", choices=ENCODERS)
    feature_size: int = setting(0, "first width of the encoder; 0: its own (12 for trials)", low=0, high=1024)
    patch_merging: str = setting(
        "auto",
        "octant order of Swin's merging; auto: that of the weights, fixed from scratch",
        choices=["auto", "legacy", "fixed"],
    )
    decoder: str = setting(
        "auto", "segmentation decoder; auto: the encoder's family", choices=["auto", "swin_unetr", "unet", "nnunet"]
    )
    gradient_checkpointing: bool = setting(False, "recompute encoder blocks in the backward pass to save memory")
    weights: str = setting("", "pre-trained weights (file, folder or hub id); empty: from scratch", path=True)
    scratch: bool = setting(False, "take only the sizes of weights and start at random: the baseline to weights")
    allow_partial: bool = setting(False, "accept weights that cover under 95 % of the encoder")
    mode: str = setting(
        "full",
        "train everything, a head on the frozen encoder, or nearest neighbours of its features",
        choices=["full", "linear_probe", "knn_probe"],
    )
    freeze: str = setting(
        "none",
        "parts of the encoder that stay as loaded; stages_N: its first N stages",
        choices=["none", "encoder", "stages_*"],
    )
    layer_decay: float = setting(1.0, "rate of a stage over that of the next deeper one; 1 is off", above=0, high=1)
    knn_neighbours: int = setting(20, "neighbours of mode=knn_probe", low=1)
    knn_temperature: float = setting(
        0.07, "mode=knn_probe: a neighbour counts exp(cosine / temperature)", above=0, high=100
    )

    # Optimisation
    max_epoch: int | None = setting(100, "epochs; ignored when max_steps is given", low=1)
    max_steps: int | None = setting(None, "optimizer steps", low=1)
    batch_size: int = setting(1, "images a forward pass of one process", low=1)
    accumulate: int = setting(1, "forward passes an optimizer step", low=1)
    optimizer: str = setting("adamw", "optimizer", choices=["adamw", "adamw_amsgrad", "adam", "sgd"])
    learning_rate: float = setting(3e-4, "base rate", low=0)
    learning_rate_crops: int = setting(
        0, "crops a step that learning_rate is meant for: the rate scales with them; 0: it is taken as it is", low=0
    )
    weight_decay: float = setting(1e-5, "weight decay", low=0)
    schedule: str = setting("cosine", "rate after the warm-up", choices=["cosine", "constant"])
    schedule_interval: str = setting("step", "when the rate changes", choices=["step", "epoch"])
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up", low=0)
    grad_clip: float = setting(0.0, "largest gradient norm; 0 does not clip", low=0)
    precision: int | str = setting(32, "16, 32 or bf16; 16 on a CPU falls back to 32 with a notice", choices=PRECISIONS)
    max_bad_steps: int = setting(0, "steps with a non-finite loss that may be skipped before the run stops", low=0)
    val_every_epochs: int = setting(1, "epochs between two validations", low=1)
    checkpoint_every_n_steps: int = setting(
        0, "extra checkpoint interval in optimizer steps; 0: validation only", low=0
    )

    # Inference and report
    roi: tuple[int, ...] | None = setting(None, "voxels of crop and window; None: the task's", low=8, high=1024)
    overlap: float | None = setting(None, "overlap of neighbouring windows; None: the task's", low=0, below=1)
    blending: str = setting("task", "weight of voxels inside a window", choices=["task", "constant", "gaussian"])
    crops_per_volume: int | None = setting(None, "training crops of one volume in a step; None: the task's", low=1)
    positive: float | None = setting(None, "weight of crops centred on foreground; None: the task's", low=0)
    negative: float | None = setting(None, "weight of crops centred on background; None: the task's", low=0)
    sw_batch_size: int = setting(2, "windows a forward pass of inference", low=1)
    tta: bool = setting(False, "average over flips at test time")
    ensemble: tuple[str, ...] = setting(
        [], "run folders or checkpoints whose probabilities are averaged with this run's"
    )
    predict: bool = setting(True, "write the predictions of the test cases")
    bootstrap_rounds: int = setting(1000, "resamplings of the patients for every interval", low=1, high=100000)
    pictures: bool = setting(True, "write curves, overlays and the HTML report")

    # Hardware
    num_gpus: int | None = setting(None, "accelerators a node; 0: CPU; None: what is there", low=0, high=1024)
    devices: tuple[int, ...] | None = setting(None, "device indices; None: the first num_gpus", low=0)
    num_nodes: int = setting(1, "machines", low=1)

    # The benchmark's own keys
    extra: dict[str, Any] = setting({}, "values of the benchmark's own keys")  # noqa: RUF009 - a field

    def to_dict(self) -> dict[str, Any]:
        """Every key as plain JSON types, the benchmark's own beside the shared ones, as a command line has them."""
        shared = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        own = shared.pop("extra")
        del shared["benchmark"]
        return {**shared, **own}

    def to_dict_without_places(self) -> dict[str, Any]:
        """Like :meth:`to_dict`, of places on disk only the last name: for checkpoints, which travel."""
        values = self.to_dict().items()
        return {name: Path(value).name if name in PLACES and value else value for name, value in values}


PLACES = tuple(field.name for field in dataclasses.fields(FinetuneConfig) if field.metadata["path"])
"""Keys that are places on disk."""


@functools.cache
def _declarations() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(FinetuneConfig)
    given = (field for field in dataclasses.fields(FinetuneConfig) if field.name not in ("benchmark", "extra"))
    return {field.name: (field, hints[field.name]) for field in given}


def _extra_declaration(default: Any) -> tuple[dataclasses.Field[Any], Any]:
    """Field and type of a benchmark's own key, told from its default; a list is a list of its first item's type."""
    doc = "key of this benchmark, see its README"
    if isinstance(default, list | tuple):
        kind = type(default[0]) if default else str
        return setting(list(default), doc), tuple[kind, ...]  # type: ignore[valid-type]
    return setting(default, doc), (type(default) if default is not None else str | None)


def _all_declarations(benchmark: Benchmark | None) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    own = {} if benchmark is None else benchmark.extra_keys
    return {**_declarations(), **{name: _extra_declaration(default) for name, default in own.items()}}


def finetune_defaults(benchmark: Benchmark | None = None) -> dict[str, Any]:
    """Default of every key as plain JSON types: the benchmark's own over the shared ones (a fresh copy)."""
    defaults = {name: plain(field.metadata["default"]) for name, (field, _) in _all_declarations(benchmark).items()}
    if benchmark is None:
        return defaults
    places = {"data_root": f"data/downstream/{benchmark.name}", "work_dir": f"data/downstream_work/{benchmark.name}"}
    return {**defaults, **places, **{name: plain(value) for name, value in benchmark.defaults.items()}}


def finetune_key_table(benchmark: Benchmark | None = None) -> list[tuple[str, Any, str, str]]:
    """Every key with its default, what it allows in words, and its meaning."""
    defaults = finetune_defaults(benchmark)
    rows = _all_declarations(benchmark).items()
    return [(name, defaults[name], describe(field, hint), field.metadata["doc"]) for name, (field, hint) in rows]


def resolve_finetune_config(
    values: Mapping[str, Any] | None = None, benchmark: Benchmark | None = None
) -> FinetuneConfig:
    """Check a (partial) dictionary of keys and return the frozen config.

    Args:
        values: key -> value; missing keys take the benchmark's default, then the shared one.
        benchmark: whose defaults and own keys count; None for the shared keys alone.

    Returns:
        The typed config.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, or keys that contradict each other.
    """
    declarations = _all_declarations(benchmark)
    checked: dict[str, Any] = {}
    for name, value in {**finetune_defaults(benchmark), **dict(values or {})}.items():
        if name not in declarations:
            raise _unknown_key(name, value, list(declarations))
        field, hint = declarations[name]
        checked[name] = check_value(name, _normalise(name, value, hint), field, hint)
        if field.metadata["path"] and isinstance(checked[name], str):
            checked[name] = os.path.expanduser(checked[name])
    own = {name: checked.pop(name) for name in list(checked) if name not in _declarations()}
    config = FinetuneConfig(**checked, benchmark=benchmark.name if benchmark else "", extra=own)
    check_finetune_config(config)
    return config


def _unknown_key(name: str, value: Any, known: list[str]) -> ConfigError:
    near = suggest(name, known)
    return ConfigError(
        f"{name}={value!r}: there is no such key",
        f"write {near}=..." if near else "list the keys with: print_keys",
    )


def _normalise(name: str, value: Any, hint: Any) -> Any:
    """Accept other spellings: precision as text, an unquoted list of words."""
    if isinstance(value, str) and hint == tuple[str, ...]:
        return [word.strip(" \"'") for word in value.strip("[]() ").split(",") if word.strip()]
    if name == "precision" and isinstance(value, str):
        spelled = {"16-mixed": 16, "16": 16, "32": 32, "32-true": 32, "bf16-mixed": "bf16"}
        return spelled.get(value, value)
    return value
