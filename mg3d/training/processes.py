"""Who am I among how many: world size and rank from torchrun, SLURM or the launcher of Lightning, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mg3d.errors import ConfigError

_SPECIAL_STEPS = 0xFFFFFFF0
"""SLURM numbers its batch script, interactive shells and the like from here on."""


@dataclass(frozen=True)
class ProcessLayout:
    """Place of this process in the run.

    Attributes:
        launcher: "none" (one process, or processes that Lightning starts later), "torchrun", "slurm" or "lightning".
        nodes: number of machines.
        per_node: processes on each machine.
        rank: global index of this process.
        local_rank: index on this machine.
        main_address: host of rank 0, empty when the launcher did not say.
    """

    launcher: str
    nodes: int
    per_node: int
    rank: int
    local_rank: int
    main_address: str

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self.nodes * self.per_node

    @property
    def started_outside(self) -> bool:
        """Whether all processes of the run exist already."""
        return self.launcher != "none"


def _integer(environ: Mapping[str, str], key: str, default: int) -> int:
    text = environ.get(key, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ConfigError(f"environment variable {key}={text!r} is not a number", f"unset {key} or mend it") from error


def _launcher(environ: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environ or ("RANK" in environ and "WORLD_SIZE" in environ):
        return "torchrun"
    interactive = environ.get("SLURM_JOB_NAME", "") in ("bash", "interactive")
    if "SLURM_NTASKS" in environ and "SLURM_PROCID" in environ and not interactive:
        return "slurm"
    return "lightning" if "LOCAL_RANK" in environ and "WORLD_SIZE" in environ else "none"


def _check_environment(environ: Mapping[str, str], launcher: str) -> None:
    """Refuse variables that name other processes which nothing has started, or that cannot be found.

    Without these checks a run would wait for them until its time-out, or every process would train on its own.
    """
    for one, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        # the trainer's own children have LOCAL_RANK in place of RANK
        if (
            environ.get(one)
            and not environ.get(other)
            and launcher == "none"
            and _integer(environ, one, 0) > (one == "WORLD_SIZE")
        ):
            raise ConfigError(
                f"environment variable {one}={environ[one]} is set, but {other} is not",
                "start with torchrun or srun, or unset it for a single process",
            )
    if launcher == "slurm" and _integer(environ, "SLURM_NTASKS", 1) > 1 and not _in_started_step(environ):
        raise ConfigError(
            f"SLURM_NTASKS={environ['SLURM_NTASKS']}, but srun did not start this process: the others do not exist",
            "start with srun, e.g. srun python main.py ..., see run_scripts/pretrain_multi_gpus.sh",
        )
    if launcher != "torchrun":
        return
    world, rank = _integer(environ, "WORLD_SIZE", 1), _integer(environ, "RANK", 0)
    if not 0 <= rank < world:
        raise ConfigError(f"environment variables RANK={rank}, WORLD_SIZE={world}", "count ranks from 0")
    if world > 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"WORLD_SIZE={world}, but MASTER_ADDR is not set: rank 0 cannot be found",
            "start with torchrun, or export MASTER_ADDR and MASTER_PORT, the same for every process",
        )
    _integer(environ, "MASTER_PORT", 0)


def _in_started_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process: in a step with a number, which the batch script itself is not."""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    return step.isdigit() and int(step) < _SPECIAL_STEPS


def _first_host(nodelist: str) -> str:
    """First host of a SLURM node list such as ``gpu[03-05,9],cpu1`` (without asking scontrol)."""
    head, bracket, tail = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    first = tail.split("]")[0].split(",")[0].split("-")[0]
    return head + first


def detect_layout(num_gpus: int | None, num_nodes: int, environ: Mapping[str, str] | None = None) -> ProcessLayout:
    """Read the layout from the environment and hold it against the config.

    On the CPU (``num_gpus=0``) the number of processes is what the launcher says: ``torchrun --nproc_per_node 2``
    gives two; without a launcher there is one.

    Args:
        num_gpus: GPUs per machine as configured, 0 for the CPU, None for whatever is there.
        num_nodes: machines as configured.
        environ: the process environment.

    Raises:
        ConfigError: the launcher started another number of processes than the config asks for, or the variables speak
            of processes that no launcher started.
    """
    environ = os.environ if environ is None else environ
    launcher = _launcher(environ)
    _check_environment(environ, launcher)
    if launcher == "none":
        return ProcessLayout("none", num_nodes, max(num_gpus or 1, 1), 0, 0, "")
    if launcher == "slurm":
        world = _integer(environ, "SLURM_NTASKS", 1)
        nodes = _integer(environ, "SLURM_JOB_NUM_NODES", _integer(environ, "SLURM_NNODES", 1))
        per_node = max(world // max(nodes, 1), 1)
        rank, local_rank = _integer(environ, "SLURM_PROCID", 0), _integer(environ, "SLURM_LOCALID", 0)
        nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
        layout = ProcessLayout(
            "slurm", nodes, per_node, rank, local_rank, environ.get("MASTER_ADDR") or _first_host(nodelist)
        )
    else:
        world = _integer(environ, "WORLD_SIZE", 1)
        local_rank = _integer(environ, "LOCAL_RANK", 0)
        per_node = _integer(environ, "LOCAL_WORLD_SIZE", max(world // max(num_nodes, 1), 1))
        nodes = max(world // max(per_node, 1), 1)
        node_rank = _integer(environ, "GROUP_RANK", _integer(environ, "NODE_RANK", 0))
        rank = _integer(environ, "RANK", node_rank * per_node + local_rank)
        layout = ProcessLayout(launcher, nodes, per_node, rank, local_rank, environ.get("MASTER_ADDR", ""))
    _check(layout, world, num_gpus, num_nodes)
    return layout


def _check(layout: ProcessLayout, world: int, num_gpus: int | None, num_nodes: int) -> None:
    said = f"{layout.launcher} started {world} processes on {layout.nodes} nodes ({layout.per_node} on each)"
    if layout.world_size != world:
        raise ConfigError(said, "start the same number of processes on every node")
    if layout.nodes != num_nodes:
        raise ConfigError(f"{said}, but num_nodes={num_nodes}", f"give num_nodes={layout.nodes}")
    if num_gpus and layout.per_node != num_gpus:
        raise ConfigError(
            f"{said}, but num_gpus={num_gpus}",
            f"give num_gpus={layout.per_node}, or start {num_gpus} processes per node",
        )
