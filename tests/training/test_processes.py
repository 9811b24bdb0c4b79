"""Ranks and world size from the environments of torchrun and SLURM."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mg3d.errors import ConfigError, RunFailedError
from mg3d.training import hardware
from mg3d.training.failures import told_plainly
from mg3d.training.hardware import cluster_environment
from mg3d.training.processes import ProcessLayout, detect_layout

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
    "SLURM_STEP_ID": "0",
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


@pytest.mark.parametrize("step", [None, "", "batch", "4294967291", "4294967290"])
def test_a_job_of_several_tasks_without_srun_is_refused_at_once(step: str | None) -> None:
    environ = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    with pytest.raises(ConfigError, match="start with srun"):
        detect_layout(0, 2, environ if step is None else environ | {"SLURM_STEP_ID": step})
    alone = environ | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}
    assert detect_layout(0, 1, alone).world_size == 1


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "1"}, "WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "p"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE"),
    ],
)
def test_half_of_the_variables_of_a_launcher_is_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        detect_layout(0, 1, environ)


def test_leftover_variables_of_a_single_process_do_no_harm() -> None:
    for environ in ({"WORLD_SIZE": "1"}, {"RANK": "0"}, {"LOCAL_RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        assert detect_layout(0, 1, environ).world_size == 1


@pytest.mark.parametrize(("rank", "address", "awaited"), [(0, "127.0.0.1", "others"), (1, "nowhere.invalid", "rank 0")])
def test_a_process_that_waits_says_for_whom_and_blames_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int, address: str, awaited: str
) -> None:
    port = "29611"
    environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": port}
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(hardware, "WAITING_S", 0.1)
    monkeypatch.setattr(hardware, "PROCESS_GROUP_TIMEOUT", timedelta(seconds=2))
    layout = ProcessLayout("torchrun", 1, 2, rank, rank, address)
    with caplog.at_level("WARNING", "mg3d"), pytest.raises(RunFailedError) as caught:
        with told_plainly(), hardware.process_group(layout, hardware.Hardware("cpu", 2, "32-true", 2, "auto")):
            raise AssertionError("unreachable")
    assert (
        f"rank {rank} of 2 waits for" in caplog.text and awaited in caplog.text and f"{address}:{port}" in caplog.text
    )
    assert "in vain" in caught.value.message and "another process" not in str(caught.value)
