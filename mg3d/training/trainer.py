"""One run from config to metrics: folder, module, data, trainer, and what is left behind."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger

from mg3d.config_schema import PLACES, MG3DConfig, config_defaults, resolve_config
from mg3d.errors import ConfigError
from mg3d.training import collective, provenance
from mg3d.training.best_checkpoints import BestCheckpoints, copy_checkpoint
from mg3d.training.callbacks import LastCheckpoint, StepMonitor, ValidationImages
from mg3d.training.checkpoint_io import AtomicCheckpointIO
from mg3d.training.continuation import RECORD_KEY, Continuation, RunRecord, compare, load_weights_alone
from mg3d.training.exact_resume import CatchUp, ExactResume
from mg3d.training.failures import told_plainly
from mg3d.training.hardware import Hardware, choose_hardware, cluster_environment, process_group, set_determinism
from mg3d.training.preparation import Places, prepare_process, shared_places, write_head
from mg3d.training.processes import ProcessLayout, detect_layout
from mg3d.training.progress import RunProgressBar, silence_noise
from mg3d.training.run_folder import CHECKPOINTS, write_json
from mg3d.training.settings import TrainingConfig
from mg3d.training.steps import accumulation, training_steps, validation_interval
from mg3d.training.tracking import tracked

log = logging.getLogger(__name__)

EPOCHS_WITH_MAX_STEPS = 1000
MONITORED = "val/the_metric"
RANK_SEED_STRIDE = 1_000_003


def is_finetune(cfg: MG3DConfig) -> bool:
    """Whether checkpoints hold weights only: fine-tuning runs, told by their name as published."""
    return "finetune" in cfg.exp_name


def common_callbacks(
    cfg: TrainingConfig, run_dir: Path, total_steps: int, record: RunRecord
) -> tuple[StepMonitor, list[Callback]]:
    """The step monitor, and the callbacks that every run has before those of its checkpoints."""
    monitor = StepMonitor(run_dir, cfg.max_bad_steps, cfg.log_every_n_steps)
    progress = RunProgressBar(total_steps, cfg.log_every_n_steps)
    exact = ExactResume({RECORD_KEY: record.as_dict()})
    return monitor, [exact, monitor, ValidationImages(), progress, CatchUp(exact)]


def build_callbacks(
    cfg: MG3DConfig, run_dir: Path, total_steps: int, record: RunRecord, resume: Path | None = None
) -> list[Callback]:
    """Callbacks of a run, in the order in which they see each event (checkpoints come last)."""
    monitor, callbacks = common_callbacks(cfg, run_dir, total_steps, record)
    if cfg.fast_dev_run:
        return callbacks
    folder = run_dir / CHECKPOINTS
    best = BestCheckpoints(folder, MONITORED, cfg.save_top_k, weights_only=is_finetune(cfg), resume=resume)
    # a report-writing run can be resumed although its published name says fine-tuning: the newest checkpoint is whole
    weights_only = is_finetune(cfg) and "clm" not in cfg.active_losses
    last = LastCheckpoint(folder, monitor, cfg.checkpoint_every_n_steps, weights_only=weights_only)
    return [*callbacks, LearningRateMonitor(logging_interval="step"), best, last]


def build_trainer(
    cfg: TrainingConfig,
    hardware: Hardware,
    layout: ProcessLayout,
    run_dir: Path,
    callbacks: list[Callback],
    **changes: Any,
) -> pl.Trainer:
    """The trainer of ``cfg`` (spec/pretraining section 10).

    Args:
        cfg: the config.
        hardware: accelerator, devices, precision.
        layout: place of this process in the run.
        run_dir: folder of the run.
        callbacks: in the order in which they see each event.
        **changes: further arguments of Lightning's trainer, or other values of those set here.
    """
    plugins: list[Any] = [AtomicCheckpointIO()]
    if hardware.world_size > 1 or layout.launcher == "slurm":
        plugins.append(cluster_environment(layout))
    arguments: dict[str, Any] = {
        "accelerator": hardware.accelerator,
        "devices": hardware.devices,
        "num_nodes": layout.nodes,
        "strategy": hardware.strategy,
        "precision": hardware.precision,
        "max_epochs": EPOCHS_WITH_MAX_STEPS if cfg.max_steps is not None else cfg.max_epoch,
        "max_steps": cfg.max_steps if cfg.max_steps is not None else -1,
        "accumulate_grad_batches": accumulation(cfg, hardware.world_size),
        "val_check_interval": cfg.val_check_interval,
        "gradient_clip_val": cfg.grad_clip or None,
        "log_every_n_steps": cfg.log_every_n_steps,
        "fast_dev_run": cfg.fast_dev_run,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": cfg.default_root_dir,
        "logger": False if cfg.fast_dev_run else TensorBoardLogger(save_dir=run_dir, name="", version=""),
        "callbacks": callbacks,
        "plugins": plugins,
        "enable_checkpointing": not cfg.fast_dev_run,
        **set_determinism(cfg.deterministic),
    }
    return pl.Trainer(**{**arguments, **changes})


def default_initialise(cfg: MG3DConfig, module: pl.LightningModule) -> dict[str, Any]:
    """Weights of ``load_path``, if any; returns the coverage report."""
    from mg3d.models.checkpoint import load_weights

    return load_weights(module, cfg.load_path, allow_partial=cfg.load_partial).as_dict() if cfg.load_path else {}


def default_finish(
    cfg: MG3DConfig, trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, run_dir: Path
) -> dict[str, Any]:
    """Evaluation of the pre-trained model, on rank 0, with ``evaluate``."""
    if not (cfg.evaluate and trainer.is_global_zero):
        return {}
    from mg3d.evaluation import evaluate_run

    return evaluate_run(module, data, cfg, run_dir)


def default_datamodule(cfg: MG3DConfig) -> pl.LightningDataModule:
    """Data of the pre-training task."""
    from mg3d.datamodules.pretraining import MG3DDataModule
    from mg3d.models.language_encoders import create_tokenizer

    return MG3DDataModule(cfg, create_tokenizer(cfg.tokenizer))


def default_module(cfg: MG3DConfig, num_training_steps: int) -> pl.LightningModule:
    """Model of the pre-training task."""
    from mg3d.models.mg3d_module import MG3DModule

    return MG3DModule(cfg, num_training_steps=num_training_steps, geometry=description_of_data(cfg))


def description_of_data(cfg: MG3DConfig) -> dict[str, Any]:
    """How volumes and reports were prepared, and by which code: stored with the weights."""
    from mg3d.datasets.stored_geometry import stored_geometry

    reports = {"seed": cfg.seed, "sent_level": cfg.sent_level, "fragment_separator": cfg.fragment_separator}
    made = {"datasets": list(cfg.datasets), "reports": reports, "source_commit": provenance.code_state()["commit"]}
    return {**stored_geometry(cfg.data_root, cfg.datasets), **made}


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains: what differs between tasks, so that they share everything else.

    The data module also has ``batches_per_epoch(world_size)``: batches of one process in a training epoch.

    Attributes:
        datamodule: makes the data.
        module: makes the model of a run of that many optimizer steps.
        initialise: gives a new model its first weights; what it returns goes into ``weights_report.json``.
        finish: called on every process after the last step; rank 0 returns entries for ``metrics.json``.
    """

    datamodule: Callable[[MG3DConfig], Any] = default_datamodule
    module: Callable[[MG3DConfig, int], pl.LightningModule] = default_module
    initialise: Callable[[MG3DConfig, Any], dict[str, Any]] = default_initialise
    finish: Callable[[MG3DConfig, pl.Trainer, Any, Any, Path], dict[str, Any]] = default_finish


def task_of(cfg: MG3DConfig) -> Task:
    """The task that the active objectives name: writing reports with ``clm``, else pre-training."""
    if "clm" not in cfg.active_losses:
        return Task()
    from mg3d.training import report_task

    parts = (report_task.datamodule, report_task.module, report_task.initialise, report_task.finish)
    return Task(*parts)


def run(cfg: MG3DConfig, task: Task | None = None) -> dict[str, Any]:
    """Train (or test, with ``test_only``) as the config says.

    Leaves ``log_dir/{exp_name}-seed{seed}-from_{load_path}/version_k`` with ``config.json``, ``environment.json``,
    ``status.json``, ``metrics.jsonl`` (one line per optimizer step), ``metrics.json``, TensorBoard events,
    ``checkpoints/`` and, with ``load_path``, ``weights_report.json``. A resumed run opens a new version.

    Args:
        cfg: the checked config.
        task: data, model and what follows training; that of the active objectives when None.

    Returns:
        ``{"run_dir": ..., "steps": ..., "metrics": {name: {"mean": ...}}}``.

    Raises:
        MG3DError: bad input (exit code 2), a failed run (1), or a stop by signal (128 + its number).
    """
    if cfg.test_only and cfg.resume_from:
        raise ConfigError(
            f"test_only=True does not read resume_from={cfg.resume_from}", "name the weights in load_path"
        )
    layout = detect_layout(cfg.num_gpus, cfg.num_nodes)
    with told_plainly():
        hardware = choose_hardware(cfg, layout)
        prepare_process(cfg)
        with process_group(layout, hardware):
            places = shared_places(cfg, layout)
            going_on = None
            if places.resume and places.record:
                going_on = compare(
                    places.resume, places.record, cfg.to_dict(), config_defaults(), hardware.world_size, places=PLACES
                )
            described = provenance.describe(cfg.data_root, cfg.datasets, hardware.world_size) if not layout.rank else {}
            if layout.rank == 0:
                write_head(places, going_on.in_force(cfg.to_dict()) if going_on else cfg.to_dict(), described)
            found = provenance.content_digests(described["data"], cfg.datasets, cfg.tokenizer) if described else None
            data = json.loads(collective.from_rank_zero(json.dumps(found)))
            if going_on and not going_on.refused:
                cfg = resolve_config(going_on.in_force(cfg.to_dict()))
            job = _Job(cfg, task or task_of(cfg), hardware, layout, places, data)
            return tracked(layout.rank, places.run_dir, lambda: _execute(job, going_on))


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run whose folder exists; ``data`` is known to the processes of a process group."""

    cfg: MG3DConfig
    task: Task
    hardware: Hardware
    layout: ProcessLayout
    places: Places
    data: dict[str, str] | None


def _execute(job: _Job, going_on: Continuation | None) -> dict[str, Any]:
    cfg, task, run_dir, world_size = job.cfg, job.task, job.places.run_dir, job.hardware.world_size
    if going_on is not None:
        going_on.check(job.data)
    silence_noise()
    datamodule = task.datamodule(cfg)
    steps = 1 if cfg.test_only else training_steps(cfg, datamodule.batches_per_epoch, world_size)
    pl.seed_everything(cfg.seed, verbose=False)
    module = task.module(cfg, steps)
    report = task.initialise(cfg, module)
    if report and job.layout.rank == 0:
        write_json(run_dir / "weights_report.json", report)
    if going_on is None and job.places.resume:
        load_weights_alone(module, job.places.resume)
    record, resume = (
        RunRecord(cfg.to_dict_without_places(), job.data, world_size),
        job.places.resume if going_on else None,
    )
    callbacks, changes = build_callbacks(cfg, run_dir, steps, record, resume), {}
    if not cfg.test_only:
        batches = datamodule.batches_per_epoch(world_size)
        changes = {"val_check_interval": validation_interval(cfg, batches, world_size)}
    trainer = build_trainer(cfg, job.hardware, job.layout, run_dir, callbacks, **changes)
    if job.layout.rank:  # the same weights everywhere, other dropout on every rank
        pl.seed_everything((cfg.seed + job.layout.rank * RANK_SEED_STRIDE) % 2**32, verbose=False)
    if cfg.test_only:
        trainer.test(module, datamodule=datamodule, verbose=False)
    else:
        trainer.fit(module, datamodule=datamodule, ckpt_path=str(resume) if resume else None, weights_only=True)
        if resume and trainer.is_global_zero:  # nothing was left to train, so nothing was saved
            copy_checkpoint(resume, run_dir / CHECKPOINTS / LastCheckpoint.FILE)
    steps_done, metrics = trainer.global_step, logged_metrics(trainer)
    if not cfg.test_only and must_validate(trainer):
        trainer.validate(module, datamodule=datamodule, verbose=False)
        metrics |= logged_metrics(trainer)
    metrics |= task.finish(cfg, trainer, module, datamodule, run_dir)
    if trainer.is_global_zero:
        write_json(run_dir / "metrics.json", metrics)
    return {"run_dir": str(run_dir), "steps": steps_done, "metrics": metrics}


def must_validate(trainer: pl.Trainer) -> bool:
    """Whether the run ended between two validations, so that the final weights are not validated yet."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    monitor = next(callback for callback in callbacks if isinstance(callback, StepMonitor))
    return monitor.validated_step != trainer.global_step


def logged_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """What the module logged over whole epochs, as ``{name: {"mean": value}}``; single training steps are left out."""
    logged = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("lr-")}
    ends = ("_epoch", "/the_metric")
    kept = {key: value for key, value in logged.items() if "train/" not in key or key.endswith(ends)}
    return {key: {"mean": value.item()} for key, value in sorted(kept.items())}
