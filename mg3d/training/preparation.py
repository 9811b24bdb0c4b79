"""What happens before a trainer exists: process limits, the run folder, the checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mg3d.config_schema import MG3DConfig
from mg3d.errors import CheckpointError, MG3DError, RunFailedError
from mg3d.training import collective, environment
from mg3d.training.checkpoint_io import check_file, newest_checkpoint, read_sidecar, remove_leftovers
from mg3d.training.continuation import RunRecord, read_record
from mg3d.training.logging_jsonl import STEP_LOG, take_over
from mg3d.training.processes import ProcessLayout
from mg3d.training.run_folder import (
    CHECKPOINTS,
    create_run_folder,
    refuse_living_run,
    run_name,
    versions,
    write_json,
)
from mg3d.training.settings import TrainingConfig

log = logging.getLogger(__name__)

RUN_FOLDER_VARIABLE = "MG3D_RUN_FOLDER"
"""Tells processes that the trainer starts itself which folder and checkpoint their parent chose."""


def resolve_resume(cfg: TrainingConfig) -> Path | None:
    """Checkpoint that ``resume_from`` names: a file, a run folder, or "last" for the newest of this experiment.

    Raises:
        CheckpointError: nothing there can be resumed.
        EnvironmentProblem: another process still writes that run (a file of it may be named all the same).
    """
    if not cfg.resume_from:
        return None
    given = Path(cfg.resume_from).expanduser()
    experiment = Path(cfg.log_dir).expanduser() / run_name(cfg.exp_name, cfg.seed, cfg.load_path)
    if cfg.resume_from == "last" or given.is_dir():
        last = cfg.resume_from == "last"
        folders = [folder / CHECKPOINTS for _, folder in versions(experiment)] if last else [given, given / CHECKPOINTS]
        refuse_living_run(folders)
        choice = newest_checkpoint(folders)
        for path, problem in choice.skipped:
            log.warning("resume: skipped %s: %s", path, problem)
        for path in remove_leftovers(choice.path.parent):
            log.info("resume: removed the half-written %s", path)
        return choice.path
    problem = check_file(given)
    if not problem and not cfg.resume_weights_only and read_sidecar(given)[1].get("kind") == "weights":
        problem = "it holds weights only and cannot be resumed (use load_path)"
    if problem:
        raise CheckpointError(f"resume_from={given}: {problem}", "give a whole checkpoint, or resume_from=last")
    return given


def prepare_process(cfg: MG3DConfig) -> None:
    """Set threads and limits of this process and check that the loader fits in shared memory."""
    depth, height, width = cfg.volume_size
    volumes = cfg.per_gpu_batchsize * (1 + cfg.draw_false_image)
    set_limits(cfg, 4 * depth * height * width * volumes)


def set_limits(cfg: TrainingConfig, batch_bytes: int) -> None:
    """Set threads and limits of this process and check that its loader fits in shared memory.

    Args:
        cfg: the config.
        batch_bytes: size of one batch of one process.

    Raises:
        EnvironmentProblem: too little shared memory.
    """
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    limit = environment.raise_open_file_limit()
    if cfg.num_workers and limit < environment.LOW_OPEN_FILES:
        log.warning("only %d open files are allowed: loader workers pass tensors through files instead", limit)
        torch.multiprocessing.set_sharing_strategy("file_system")
    environment.check_shared_memory(cfg.num_workers, batch_bytes)
    if cfg.precision != 32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a run writes, and what it goes on with; the same on every rank.

    Attributes:
        run_dir: folder of the run.
        resume: checkpoint; None for a new run.
        record: what the checkpoint was trained with; None for a new run or one that takes its weights alone.
    """

    run_dir: Path
    resume: Path | None
    record: RunRecord | None


def shared_places(cfg: TrainingConfig, layout: ProcessLayout) -> Places:
    """Run folder, checkpoint to resume from and its record, decided by rank 0 and known to all ranks."""
    inherited = os.environ.get(RUN_FOLDER_VARIABLE, "")
    decided, problem = "", None
    if layout.launcher == "lightning" and inherited:
        decided = inherited
    elif layout.rank == 0:
        try:
            resume = resolve_resume(cfg)
            record = read_record(resume).as_dict() if resume and not cfg.resume_weights_only else None
            folder = create_run_folder(cfg.log_dir, cfg.exp_name, cfg.seed, cfg.load_path)
            decided = json.dumps([str(folder), str(resume) if resume else "", record])
        except MG3DError as error:  # told after the broadcast, so that no rank is left waiting
            problem = error
    decided = collective.from_rank_zero(decided)
    if problem:
        raise problem
    if not decided:
        raise RunFailedError("rank 0 could not prepare the run", "read the message of rank 0")
    run_dir, resume_from, record = json.loads(decided)
    if layout.launcher == "none":
        os.environ[RUN_FOLDER_VARIABLE] = decided  # for the ranks that the trainer starts itself
    return Places(Path(run_dir), Path(resume_from) if resume_from else None, RunRecord(**record) if record else None)


def write_head(
    places: Places, config: Mapping[str, Any], described: Mapping[str, Any], logs: Sequence[str] = ()
) -> None:
    """Write what is known of a run before it starts, with the log of the run it goes on with up to its checkpoint.

    Args:
        places: of the run.
        config: the keys as the run uses them.
        described: of :func:`mg3d.training.provenance.describe`.
        logs: logs of one line a validation, beside the step log.
    """
    log.info("run folder %s", places.run_dir)
    write_json(places.run_dir / "config.json", config)
    about: dict[str, Any] = {"resumed_from": str(places.resume) if places.resume else None}
    if places.resume and places.record:
        about["resumed_step"] = places.record.step
        earlier, step = places.resume.parent.parent, places.record.step
        take_over(earlier / STEP_LOG, places.run_dir / STEP_LOG, step)
        for name in logs:  # the validation of that step may be to come
            take_over(earlier / name, places.run_dir / name, step if places.record.validated else step - 1)
    write_json(places.run_dir / "environment.json", {**described, **about})
