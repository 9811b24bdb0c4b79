"""Ranks and world size from the environments of torchrun and SLURM."""

from __future__ import annotations

import pytest

from mg3d.errors import ConfigError
from mg3d.training.hardware import cluster_environment
from mg3d.training.processes import detect_layout

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "mg3d",
    "SLURM_NODELIST": "gpu[07-08]",
}


def test_one_process_without_a_launcher() -> None:
    layout = detect_layout(0, 1, {})
    assert (layout.launcher, layout.world_size, layout.rank) == ("none", 1, 0)
    assert detect_layout(4, 2, {}).world_size == 8


def test_torchrun() -> None:
    layout = detect_layout(2, 2, TORCHRUN)
    assert (layout.world_size, layout.nodes, layout.rank, layout.local_rank) == (4, 2, 3, 1)
    assert detect_layout(0, 2, TORCHRUN).per_node == 2  # on the CPU the launcher alone decides


def test_slurm_of_two_nodes_resolves_ranks_and_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    layout = detect_layout(1, 2)
    assert (layout.launcher, layout.world_size, layout.rank, layout.local_rank) == ("slurm", 2, 1, 0)
    assert layout.main_address == "gpu07"
    environment = cluster_environment(layout)
    assert (environment.world_size(), environment.global_rank(), environment.node_rank()) == (2, 1, 1)
    assert environment.main_address == "gpu07"
    assert environment.auto_requeue is False


@pytest.mark.parametrize("nodes, first", [("a1", "a1"), ("a1,b2", "a1"), ("n[3,7-9],m1", "n3"), ("x,y[1-2]", "x")])
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert detect_layout(1, 2, SLURM | {"SLURM_NODELIST": nodes}).main_address == first


def test_an_interactive_slurm_shell_is_one_process() -> None:
    assert detect_layout(1, 1, SLURM | {"SLURM_JOB_NAME": "bash"}).launcher == "none"


@pytest.mark.parametrize(
    "num_gpus, num_nodes, environ, message",
    [
        (4, 2, TORCHRUN, "num_gpus=4"),
        (2, 1, TORCHRUN, "num_nodes=1"),
        (1, 1, SLURM, "num_nodes=1"),
        (1, 2, SLURM | {"SLURM_NTASKS": "3"}, "3 processes on 2 nodes"),
        (1, 1, TORCHRUN | {"WORLD_SIZE": "two"}, "not a number"),
    ],
)
def test_a_launcher_that_contradicts_the_config_is_refused(
    num_gpus: int, num_nodes: int, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        detect_layout(num_gpus, num_nodes, environ)
    assert caught.value.remedy
