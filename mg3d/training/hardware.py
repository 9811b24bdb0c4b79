"""From config keys and process layout to the trainer's accelerator, devices, precision and process group."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from torch import distributed

from mg3d.errors import ConfigError, RunFailedError
from mg3d.training.processes import ProcessLayout
from mg3d.training.settings import TrainingConfig

log = logging.getLogger(__name__)

PROCESS_GROUP_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer than this for the others ends with an error instead of hanging."""
WAITING_S = 5.0
"""A rank that waits longer than this says for whom."""


@dataclass(frozen=True)
class Hardware:
    """Trainer arguments that depend on the machine.

    Attributes:
        accelerator: "cpu" or "gpu".
        devices: number of processes per node, or the GPU indices.
        precision: Lightning's name of the precision.
        world_size: processes of the run.
        strategy: "auto" for one process, else DDP.
    """

    accelerator: str
    devices: int | list[int]
    precision: str
    world_size: int
    strategy: str | DDPStrategy

    @property
    def backend(self) -> str:
        """Collective library that fits the accelerator."""
        return "nccl" if self.accelerator == "gpu" else "gloo"


def choose_precision(precision: int | str, accelerator: str) -> str:
    """Lightning's name for ``precision``; 16 becomes 32 on the CPU, with a notice."""
    if precision == 16 and accelerator == "cpu":
        log.warning("precision=16 needs a GPU; this CPU run uses 32")
        return "32-true"
    return {16: "16-mixed", 32: "32-true", "bf16": "bf16-mixed"}[precision]


def _gpus_per_node(cfg: TrainingConfig, layout: ProcessLayout) -> int:
    present = torch.cuda.device_count()
    if cfg.num_gpus == 0:
        return 0
    wanted = len(cfg.devices) if cfg.devices and cfg.num_gpus is None else cfg.num_gpus
    if wanted is None:
        return (layout.per_node if layout.started_outside else present) if present else 0
    if present == 0 and wanted == 1:  # the published command lines name one GPU; they work on a laptop too
        log.warning("num_gpus=1, but no GPU is visible: this run uses the CPU")
        return 0
    if present == 0:
        raise ConfigError(f"num_gpus={wanted}, but no GPU is visible", "give num_gpus=0 to train on the CPU")
    if wanted > present:
        raise ConfigError(f"num_gpus={wanted}, but {present} GPUs are visible", f"give num_gpus={present} or fewer")
    return wanted


def _device_list(cfg: TrainingConfig, gpus: int) -> int | list[int]:
    if not cfg.devices:
        return gpus
    chosen = list(cfg.devices)
    if len(chosen) != gpus:
        raise ConfigError(f"devices={chosen} names {len(chosen)} GPUs, num_gpus={gpus}", "let the two agree")
    if max(chosen) >= torch.cuda.device_count():
        raise ConfigError(
            f"devices={chosen}, but {torch.cuda.device_count()} GPUs are visible", "count the devices from 0"
        )
    return chosen


def choose_hardware(cfg: TrainingConfig, layout: ProcessLayout) -> Hardware:
    """Decide accelerator, devices, precision and strategy.

    ``num_gpus=0`` is the CPU, None takes every visible GPU (the CPU when there is none). On the CPU the process count
    comes from the launcher alone.

    Raises:
        ConfigError: more GPUs asked for than visible.
    """
    gpus = _gpus_per_node(cfg, layout)
    accelerator = "gpu" if gpus else "cpu"
    per_node = gpus or (layout.per_node if layout.started_outside else 1)
    if not gpus and layout.nodes > 1 and not layout.started_outside:
        raise ConfigError(
            f"num_nodes={layout.nodes} needs a launcher that starts every process",
            "start with torchrun or srun, see run_scripts/pretrain_multi_gpus.sh",
        )
    world = layout.nodes * per_node
    strategy: str | DDPStrategy = "auto"
    if world > 1:
        backend = "nccl" if gpus else "gloo"
        strategy = DDPStrategy(
            find_unused_parameters=True, process_group_backend=backend, timeout=PROCESS_GROUP_TIMEOUT
        )
    devices = _device_list(cfg, gpus) if gpus else per_node
    return Hardware(accelerator, devices, choose_precision(cfg.precision, accelerator), world, strategy)


def cluster_environment(layout: ProcessLayout) -> ClusterEnvironment:
    """Lightning's view of the launcher; SLURM's own re-queueing stays off, ``resume_from=last`` does that job."""
    if layout.launcher == "slurm":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if layout.launcher == "torchrun" else LightningEnvironment()


@contextmanager
def process_group(layout: ProcessLayout, hardware: Hardware) -> Iterator[None]:
    """Join the process group early, with a finite timeout, when the launcher has started all ranks already.

    Ranks must agree on the run folder before the trainer exists; the trainer finds the group made.
    """
    outside = layout.launcher in ("torchrun", "slurm") and hardware.world_size > 1
    if outside and not distributed.is_initialized():
        environment = cluster_environment(layout)
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        if hardware.accelerator == "gpu":
            devices = hardware.devices
            torch.cuda.set_device(devices[layout.local_rank] if isinstance(devices, list) else layout.local_rank)
        with _told_while_waiting(layout):
            distributed.init_process_group(
                hardware.backend, rank=layout.rank, world_size=layout.world_size, timeout=PROCESS_GROUP_TIMEOUT
            )
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def _told_while_waiting(layout: ProcessLayout) -> Iterator[None]:
    """Say who is awaited when the processes do not meet within seconds, and say so again where they never do."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    awaited = "the others" if layout.rank == 0 else "rank 0"
    start = "srun" if layout.launcher == "slurm" else "torchrun"
    told = f"rank {layout.rank} of {layout.world_size} waits for {awaited} at {place}"
    timer = threading.Timer(WAITING_S, log.warning, (f"{told}; start all {layout.world_size} with {start}",))
    timer.daemon = True
    timer.start()
    try:
        yield
    except (distributed.DistError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RunFailedError(
            f"{told.replace('waits', 'waited')} in vain: {reason}",
            f"start all {layout.world_size} processes with {start}; MASTER_ADDR and MASTER_PORT name a host that they "
            "reach, and a port that is free on it",
        ) from error
    finally:
        timer.cancel()


def set_determinism(deterministic: bool) -> dict[str, Any]:
    """Trainer arguments for determinism ("warn" where an operation has no deterministic form).

    Torch would also fill every fresh tensor with NaN in that mode; that costs bandwidth and is switched off.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return {"deterministic": "warn" if deterministic else False, "benchmark": torch.cuda.is_available()}
