"""One fine-tuning run: prepare -> train -> evaluate -> predict -> report, in a run folder that can be resumed.

Folder, checkpoints, resume, guard against non-finite steps, signals, processes and progress are those of pre-training
(`mg3d.training`); what a benchmark adds is in `mg3d.finetuning.benchmark`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, LearningRateMonitor

from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import Benchmark, ClassificationTask, ReportTask, SegmentationTask, Splits, Task
from mg3d.finetuning.checkpoints import (
    LAST,
    BestCheckpoint,
    scored_checkpoints,
    wait_for_all,
)
from mg3d.finetuning.config import PLACES, FinetuneConfig, finetune_defaults, resolve_finetune_config
from mg3d.finetuning.evaluation import Evaluation, evaluate_checkpoints, finish_report, score_probe
from mg3d.finetuning.kinds import build_datamodule, build_module
from mg3d.finetuning.learning_rate import describe_learning_rate, effective_learning_rate
from mg3d.finetuning.names import experiment_name, weights_label
from mg3d.finetuning.preparation import prepare_data
from mg3d.finetuning.splits import case_digests, data_fraction, permuted_images, permuted_labels, refuse_leakage
from mg3d.finetuning.validation_log import VALIDATION_LOG, ValidationLog
from mg3d.training import provenance
from mg3d.training.best_checkpoints import copy_checkpoint
from mg3d.training.callbacks import LastCheckpoint
from mg3d.training.continuation import Continuation, RunRecord, compare, load_weights_alone
from mg3d.training.failures import told_plainly
from mg3d.training.hardware import Hardware, choose_hardware, process_group
from mg3d.training.preparation import Places, set_limits, shared_places, write_head
from mg3d.training.processes import ProcessLayout, detect_layout
from mg3d.training.progress import silence_noise
from mg3d.training.run_folder import CHECKPOINTS, write_json
from mg3d.training.settings import RunSettings
from mg3d.training.steps import training_steps
from mg3d.training.tracking import tracked
from mg3d.training.trainer import (
    RANK_SEED_STRIDE,
    build_trainer,
    common_callbacks,
    must_validate,
)

log = logging.getLogger(__name__)

__all__ = ["run", "settings_of"]


def settings_of(cfg: FinetuneConfig, world_size: int) -> RunSettings:
    """What of a config concerns the run and not its model."""
    shared = {field.name for field in dataclasses.fields(RunSettings)} & {f.name for f in dataclasses.fields(cfg)}
    return RunSettings(
        **{name: getattr(cfg, name) for name in shared - {"batch_size"}},
        exp_name=experiment_name(cfg),
        load_path=weights_label(cfg.weights),
        resume_from=cfg.resume or None,
        per_gpu_batchsize=cfg.batch_size,
        batch_size=cfg.batch_size * cfg.accumulate * world_size,
        default_root_dir=cfg.log_dir,
    )


def run(cfg: FinetuneConfig, benchmark: Benchmark) -> dict[str, Any]:
    """Run the stages of a config.

    Leaves ``log_dir/{name}-seed{seed}-from_{weights}/version_k`` with ``config.json``, ``environment.json``,
    ``status.json``, ``splits.json``, ``metrics.json``, ``per_case.csv``, ``metrics.jsonl`` (a line a step),
    TensorBoard events, ``checkpoints/{best,last}.ckpt``, ``predictions/``, ``report.html`` and, with ``weights``,
    ``weights_report.json``. A resumed run opens a new version.

    Args:
        cfg: the checked config.
        benchmark: data and task.

    Returns:
        ``{"run_dir", "steps", "protocol", "metrics": {name: {"mean", ...}}}``.

    Raises:
        MG3DError: bad input (exit code 2), a failed run (1), or a stop by signal (128 + its number).
    """
    layout = detect_layout(cfg.num_gpus, cfg.num_nodes)
    with told_plainly():
        hardware = choose_hardware(settings_of(cfg, layout.world_size), layout)
        settings = settings_of(cfg, hardware.world_size)
        with process_group(layout, hardware):
            if layout.rank == 0:
                prepare_data(benchmark, cfg)
            wait_for_all(_device(hardware, layout))
            if set(cfg.stages) == {"prepare"}:
                return {"run_dir": cfg.work_dir, "steps": 0, "protocol": cfg.protocol, "metrics": {}}
            places = shared_places(settings, layout)
            going_on = _going_on(cfg, benchmark, places, hardware)
            in_force = going_on.in_force(cfg.to_dict()) if going_on else cfg.to_dict()
            if layout.rank == 0:
                described = provenance.describe(cfg.data_root, (), hardware.world_size)
                write_head(places, in_force, described, logs=(VALIDATION_LOG,))
            if going_on and not going_on.refused:
                cfg = resolve_finetune_config(in_force, benchmark)
            job = _Job(cfg, benchmark, settings, hardware, layout, places, going_on)
            return tracked(layout.rank, places.run_dir, lambda: _execute(job))


def _going_on(cfg: FinetuneConfig, benchmark: Benchmark, places: Places, hardware: Hardware) -> Continuation | None:
    """The checkpoint that is resumed or scored, held against the config."""
    if not (places.resume and places.record):
        return None
    defaults, trains = finetune_defaults(benchmark), "train" in cfg.stages
    given = (places.resume, places.record, cfg.to_dict(), defaults, hardware.world_size)
    return compare(*given, places=PLACES, trains=trains)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run whose folder exists."""

    cfg: FinetuneConfig
    benchmark: Benchmark
    settings: RunSettings
    hardware: Hardware
    layout: ProcessLayout
    places: Places
    going_on: Continuation | None

    @property
    def run_dir(self) -> Path:
        return self.places.run_dir

    @property
    def resume(self) -> Path | None:
        """Checkpoint to go on from, or to score; None where only its weights are taken for a new optimisation."""
        return None if self.settings.resume_weights_only and "train" in self.cfg.stages else self.places.resume

    @property
    def device(self) -> torch.device:
        return _device(self.hardware, self.layout)


def _device(hardware: Hardware, layout: ProcessLayout) -> torch.device:
    if hardware.accelerator != "gpu":
        return torch.device("cpu")
    devices = hardware.devices
    return torch.device("cuda", devices[layout.local_rank] if isinstance(devices, list) else layout.local_rank)


def _execute(job: _Job) -> dict[str, Any]:
    silence_noise()
    cfg = _with_weights_found(job.cfg)
    task = job.benchmark.resolve_task(cfg)
    splits = _splits(job, cfg)
    data = case_digests(splits)
    if job.going_on is not None:
        job.going_on.check(data if "train" in cfg.stages else None)
    set_limits(job.settings, _batch_bytes(cfg, task))
    log.info(describe_learning_rate(cfg, task, job.hardware.world_size))
    cfg = dataclasses.replace(cfg, learning_rate=effective_learning_rate(cfg, task, job.hardware.world_size))
    datamodule = build_datamodule(cfg, task, splits)
    steps = 1
    if "train" in cfg.stages and not _is_probe(cfg, task):
        steps = training_steps(job.settings, datamodule.batches_per_epoch, job.hardware.world_size)
    pl.seed_everything(cfg.seed, verbose=False)
    module = build_module(cfg, task, steps)
    if job.layout.rank == 0 and (told := getattr(module, "text_report", None)) is not None:
        write_json(job.run_dir / "text_weights_report.json", told.as_dict())
    if cfg.weights and not cfg.scratch:
        _load_weights(job, cfg, module)
    if job.places.resume and job.resume is None:
        load_weights_alone(module, job.places.resume)
    if isinstance(task, ClassificationTask) and _is_probe(cfg, task):
        module.to(job.device)
        evaluation = score_probe(cfg, task, module, datamodule)
        done = 0
    else:
        record = RunRecord(job.cfg.to_dict_without_places(), data, job.hardware.world_size)
        callbacks, best = _callbacks(job, steps, record)
        evaluation, done = _train_and_evaluate(job, cfg, task, datamodule, module, steps, callbacks, best)
    metrics = evaluation.metrics
    if job.layout.rank == 0:  # with the rows of all processes
        metrics = finish_report(cfg, job.benchmark, task, splits, evaluation, job.run_dir)
    shown = {name: entry for name, entry in metrics.items() if "=" not in name and not name.startswith("last/")}
    return {"run_dir": str(job.run_dir), "steps": done, "protocol": cfg.protocol, "metrics": shown}


def _is_probe(cfg: FinetuneConfig, task: Task) -> bool:
    """Whether features are computed once instead of training (a segmentation probe trains its decoder)."""
    return isinstance(task, ClassificationTask) and cfg.mode != "full"


def _with_weights_found(cfg: FinetuneConfig) -> FinetuneConfig:
    """The config with ``weights`` as a file or export folder here; a hub id is downloaded."""
    if not cfg.weights:
        return cfg
    from mg3d.inference.places import find_weights

    place = find_weights(cfg.weights)
    if place.kind == "architecture":
        raise ConfigError(f"weights={cfg.weights} names an architecture", f"write encoder={place.path}")
    return dataclasses.replace(cfg, weights=str(place.path))


def _splits(job: _Job, cfg: FinetuneConfig) -> Splits:
    """The parts of the benchmark, reduced and checked, and written to ``splits.json``."""
    splits = job.benchmark.splits(cfg)
    notes = (*splits.notes, *refuse_leakage(splits, cfg.protocol))
    if not splits.test and "evaluate" in cfg.stages:
        raise DataError("the test part of the split has no case", "check data_root, or leave evaluate out of stages")
    train = data_fraction(splits.train, cfg.data_fraction, cfg.seed)
    if cfg.data_fraction < 1:
        notes += (f"trained on {len(train)} of {len(splits.train)} cases (data_fraction={cfg.data_fraction:g})",)
    if cfg.shuffle_labels:
        permuted = permuted_images if isinstance(job.benchmark.task, ReportTask) else permuted_labels
        train, notes = permuted(train, cfg.seed), (*notes, "control: training labels are shuffled")
    splits = dataclasses.replace(splits, train=train, notes=notes)
    if job.layout.rank == 0:
        parts = {part: [case.id for case in getattr(splits, part)] for part in ("train", "val", "test")}
        write_json(job.run_dir / "splits.json", {**parts, "notes": list(notes)})
        log.info("cases: %s", ", ".join(f"{len(ids)} {part}" for part, ids in parts.items()))
        for note in notes:
            log.info("note: %s", note)
    return splits


def _batch_bytes(cfg: FinetuneConfig, task: Task) -> int:
    """Bytes of one training batch of one process; segmentation crops come with their labels."""
    if isinstance(task, SegmentationTask):
        return 5 * math.prod(task.roi) * task.crops_per_volume * cfg.batch_size
    return 4 * math.prod(task.size_dhw) * cfg.batch_size


def _load_weights(job: _Job, cfg: FinetuneConfig, module: pl.LightningModule) -> None:
    from mg3d.models.finetune.weights import load_encoder_weights

    report = load_encoder_weights(module, cfg, getattr(module, "pretrained_parts", ()))
    if job.layout.rank == 0:
        write_json(job.run_dir / "weights_report.json", report.as_dict())


def _train_and_evaluate(
    job: _Job,
    cfg: FinetuneConfig,
    task: Task,
    datamodule: Any,
    module: Any,
    steps: int,
    callbacks: list[Callback],
    best: BestCheckpoint | None,
) -> tuple[Evaluation, int]:
    trainer = build_trainer(
        job.settings,
        job.hardware,
        job.layout,
        job.run_dir,
        callbacks,
        check_val_every_n_epoch=cfg.val_every_epochs,
    )
    if job.layout.rank:  # the same weights everywhere, other augmentation on every rank
        pl.seed_everything((cfg.seed + job.layout.rank * RANK_SEED_STRIDE) % 2**32, verbose=False)
    if "train" in cfg.stages:
        resume = str(job.resume) if job.resume else None
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        if job.resume and job.layout.rank == 0:  # nothing was left to train, so nothing was saved
            copy_checkpoint(job.resume, job.run_dir / CHECKPOINTS / LAST)
        if must_validate(trainer):
            trainer.validate(module, datamodule=datamodule, verbose=False)
            if best is not None:
                best.consider(trainer)
    done = trainer.global_step
    wait_for_all(job.device)
    chosen = scored_checkpoints(*_scored_places(job))
    if "train" not in cfg.stages and not chosen:
        raise ConfigError(
            f"stages={','.join(cfg.stages)}: there is no trained model to score", "name its run folder with resume="
        )
    members = _ensemble(cfg, task, steps)
    evaluation = evaluate_checkpoints(cfg, task, trainer, module, datamodule, chosen, members, job.run_dir)
    return evaluation, done or max(evaluation.steps.values(), default=0)


def _callbacks(job: _Job, steps: int, record: RunRecord) -> tuple[list[Callback], BestCheckpoint | None]:
    monitor, callbacks = common_callbacks(job.settings, job.run_dir, steps, record)
    if job.settings.fast_dev_run:
        return callbacks, None
    folder = job.run_dir / CHECKPOINTS
    best = BestCheckpoint(folder, monitor, job.resume.parent if job.resume else None)
    last = LastCheckpoint(folder, monitor, job.settings.checkpoint_every_n_steps)
    rates = LearningRateMonitor(logging_interval="step")
    return [*callbacks, rates, ValidationLog(job.run_dir), best, last], best


def _scored_places(job: _Job) -> tuple[Path, Path | None]:
    """Folder of the checkpoints to score, and the single one that a run without training names."""
    if "train" in job.cfg.stages or job.resume is None:
        return job.run_dir / CHECKPOINTS, None
    given = Path(job.cfg.resume).expanduser()
    return job.resume.parent, job.resume if given.is_file() else None


def _ensemble(cfg: FinetuneConfig, task: Task, steps: int) -> list[Any]:
    """Modules of other runs whose probabilities are averaged with this one's."""
    from mg3d.finetuning.checkpoints import checkpoint_of

    members = []
    for place in cfg.ensemble:
        member = build_module(cfg, task, steps)
        load_weights_alone(member, checkpoint_of(place))
        members.append(member.eval().requires_grad_(False))
    return members
