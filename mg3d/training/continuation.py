"""What a checkpoint records of its run, and how a run that goes on with it is held against that record."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from mg3d.config_types import suggest
from mg3d.errors import CheckpointError, ConfigError
from mg3d.models.checkpoint import check_resumable
from mg3d.training.checkpoint_io import load_file
from mg3d.training.exact_resume import RNG_KEY, Position
from mg3d.training.resume_rules import APPLIED, DECIDES_SPLIT, OVERRULED, why_refused
from mg3d.training.run_folder import plain

__all__ = ["RECORD_KEY", "Continuation", "RunRecord", "compare", "load_weights_alone", "read_record"]

log = logging.getLogger(__name__)

RECORD_KEY = "mg3d_run"
"""Entry of a checkpoint: the fields of :class:`RunRecord`."""
DATA, PROCESSES = "data", "world_size"
SHOWN = 3
_SILENT = ("resume_from", "resume", "resume_weights_only", "resume_allow")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run was trained with, in plain types.

    Attributes:
        config: every key; of places on disk only the last name.
        data: what was read -> digest of its content; None where it is not known.
        world_size: processes; 0 where it is not known.
        step: optimizer steps done.
        epoch: epochs done.
        validated: whether these weights were validated.
    """

    config: dict[str, Any]
    data: dict[str, str] | None = None
    world_size: int = 0
    step: int = 0
    epoch: int = 0
    validated: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return plain(dataclasses.asdict(self))


def read_record(path: Path) -> RunRecord:
    """The record of a checkpoint. Older ones hold at most the config, and the number of processes.

    Raises:
        CheckpointError: damaged or unsafe.
    """
    content = load_file(path)
    stored = content.get(RECORD_KEY)
    if not isinstance(stored, dict):
        named = content.get("hyper_parameters", {})
        stored = {"config": dict(named) if "seed" in named else {}, "world_size": len(content.get(RNG_KEY, ()))}
    known = {field.name for field in dataclasses.fields(RunRecord)}
    at = Position.of_checkpoint(content) if "loops" in content else Position()
    place = {"step": int(content.get("global_step", 0)), "epoch": at.epoch, "validated": at.validated}
    return RunRecord(**{"config": {}} | {key: stored[key] for key in known & stored.keys()} | place)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A checkpoint held against the config of the run that goes on with it.

    Attributes:
        checkpoint: what is resumed.
        record: what it was trained with.
        kept: keys whose value in the checkpoint counts, with that value: the config in force has these.
        refused: key -> (value asked for, value of the checkpoint) that cannot change.
        allowed: names that the user lets differ.
    """

    checkpoint: Path
    record: RunRecord
    kept: dict[str, Any]
    refused: dict[str, tuple[Any, Any]]
    allowed: tuple[str, ...]

    def in_force(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a config as the run uses them, or would use them."""
        return {**config, **self.kept}

    def check(self, data: Mapping[str, str] | None = None) -> None:
        """Refuse what cannot change.

        Args:
            data: what this run reads -> digest; None leaves the data out.

        Raises:
            ConfigError: naming the key, both values and the way out.
        """
        found = {
            key: f"{key}={new!r}, in the checkpoint {old!r}: {why_refused(key)}"
            for key, (new, old) in self.refused.items()
        }
        stored = self.record.data
        if data is not None and stored is not None and DATA not in self.allowed:
            changed = sorted(name for name in {*data, *stored} if data.get(name) != stored.get(name))
            found |= {DATA: f"data: other content in {', '.join(changed[:SHOWN])}"} if changed else {}
        if not found:
            return
        told = list(found.values())[:SHOWN]
        if len(found) > SHOWN:
            told[-1] = f"and {', '.join(list(found)[SHOWN - 1 :])}"
        raise ConfigError(
            "\n  ".join([f"cannot go on with {self.checkpoint}:", *told]),
            "leave it as it was, or start a new optimisation from these weights with resume_weights_only=True "
            f"(resume_allow=[{_root(next(iter(found)))}] goes on all the same, not exactly)",
        )


def compare(
    checkpoint: Path,
    record: RunRecord,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    world_size: int,
    *,
    places: Sequence[str] = (),
    trains: bool = True,
) -> Continuation:
    """Hold a config against the record of the checkpoint it goes on with, and say what is applied.

    Args:
        checkpoint: what is resumed.
        record: of the checkpoint.
        config: every key of this run as plain types, with ``resume_allow``.
        defaults: what a key had before it existed.
        world_size: processes of this run.
        places: keys that are places on disk, compared by their last name.
        trains: False where the checkpoint is only scored.

    Raises:
        ConfigError: ``resume_allow`` names what does not exist.
    """
    allowed = tuple(config["resume_allow"])
    for name in allowed:
        if name not in (*config, *record.config, DATA, PROCESSES):
            near = suggest(name, [*config, DATA, PROCESSES])
            mend = f"write resume_allow=[{near}]" if near else "leave it out"
            raise ConfigError(f"resume_allow names {name!r}, which is no key", mend)
    changed = _changed(record.config, config, defaults, places) if record.config else {}
    if record.world_size and record.world_size != world_size:
        changed[PROCESSES] = (world_size, record.world_size)
    if not trains:
        changed = {key: values for key, values in changed.items() if key in DECIDES_SPLIT}
    free = {*APPLIED, *allowed}
    refused = {key: values for key, values in changed.items() if not {key, _root(key)} & free}
    held = {_root(key) for key in changed if key in refused or _root(key) in OVERRULED}
    kept = {key: record.config[key] for key in sorted(held & record.config.keys() & config.keys())}
    if trains:
        refused |= _limits(config, record)
        _say(checkpoint, record, {key: pair for key, pair in changed.items() if key not in refused}, kept)
    return Continuation(checkpoint, record, kept, refused, allowed)


def _root(key: str) -> str:
    return key.partition(".")[0]


def _changed(
    stored: Mapping[str, Any], config: Mapping[str, Any], defaults: Mapping[str, Any], places: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Key -> (new, old) of every key that differs; dictionaries are compared by their entries."""
    before, now = _flat({**defaults, **stored}, places), _flat(config, places)
    pairs = {key: (now.get(key), before.get(key)) for key in sorted({*before, *now})}
    unset = {key for key in ("load_path", "weights") if not now.get(key)}  # only an interrupted run names them again
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in unset}


def _flat(values: Mapping[str, Any], places: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in plain(values).items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": entry for name, entry in value.items()}
        else:
            found[key] = Path(value).name if key in places and isinstance(value, str) and value else value
    return found


def _limits(config: Mapping[str, Any], record: RunRecord) -> dict[str, tuple[Any, Any]]:
    """A limit that lies before the place of the checkpoint."""
    steps, epochs = config.get("max_steps"), config.get("max_epoch")
    if steps is not None:
        return {"max_steps": (steps, record.step)} if steps < record.step else {}
    return {"max_epoch": (epochs, record.epoch)} if epochs is not None and epochs < record.epoch else {}


def _say(checkpoint: Path, record: RunRecord, changed: Mapping[str, tuple[Any, Any]], kept: Mapping[str, Any]) -> None:
    told = [f"{key}={new!r} (was {old!r})" for key, (new, old) in changed.items() if key not in (*_SILENT, *kept)]
    told += [f"{key}={changed[key][0]!r} is not used, it stays {old!r}" for key, old in kept.items() if key in changed]
    if told:
        log.warning("resuming with other values than in the checkpoint: %s", ", ".join(told))
    if not record.config or record.data is None:
        lacking = "its data" if record.config else "its config and data"
        log.warning("%s does not record %s: they are not compared", checkpoint, lacking)


def load_weights_alone(module: pl.LightningModule, path: Path) -> int:
    """Load the weights of a checkpoint strictly into a module, and nothing else; returns the step it was saved at.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    content = load_file(path)
    if "state_dict" not in content:
        raise CheckpointError(f"{path} holds no state_dict", "give a checkpoint of a run")
    check_resumable(module, content)
    try:
        module.load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not fit this model: {first}", "use the config of that run") from error
    return int(content.get("global_step", -1))
