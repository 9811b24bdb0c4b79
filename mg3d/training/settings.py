"""What the trainer needs to know of a run, whatever it trains. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass

from mg3d.config_schema import MG3DConfig

__all__ = ["RunSettings", "TrainingConfig"]


@dataclass(frozen=True)
class RunSettings:
    """The keys of `MG3DConfig` that concern the run and not its model, under the same names, for other tasks.

    Attributes:
        exp_name: first part of the run folder's name.
        load_path: initial weights, of which the name becomes part of the run folder's; empty for none.
        resume_from: "last", a run folder or a checkpoint; None for a new run.
        batch_size: samples an optimizer step over all processes.
        per_gpu_batchsize: samples a forward pass of one process.
        weights_only: checkpoints hold weights only and cannot be resumed.
        (others): as in `MG3DConfig`.
    """

    exp_name: str
    seed: int
    log_dir: str
    load_path: str
    resume_from: str | None
    num_gpus: int | None
    devices: tuple[int, ...] | None
    num_nodes: int
    precision: int | str
    num_threads: int
    num_workers: int
    deterministic: bool
    fast_dev_run: bool | int
    log_every_n_steps: int
    max_epoch: int | None
    max_steps: int | None
    batch_size: int
    per_gpu_batchsize: int
    grad_clip: float
    max_bad_steps: int
    checkpoint_every_n_steps: int
    default_root_dir: str
    save_top_k: int = 1
    val_check_interval: int | float = 1.0
    weights_only: bool = False
    resume_weights_only: bool = False
    resume_allow: tuple[str, ...] = ()


TrainingConfig = MG3DConfig | RunSettings
