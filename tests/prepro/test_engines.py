"""Where scans are read: same results in the same order everywhere, and nothing that one scan does ends the run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from engine_readers import DamagedReader, NumberReader, UnstartableReader, cases, number_of
from prepro_builders import ct_rate_tree

from mg3d.errors import EnvironmentProblem, RunFailedError
from prepro.engines import Failure, create_engine, load_in_order, remote
from prepro.readers.base import Case, PackedImage

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "prepro" / "prepro_pretraining_data.py"
SIZE = ("--image-size", "8", "6", "8", "--target-spacing", "none")
NOBODY = "tcp://127.0.0.1:1"


def voxels(result: PackedImage | Failure) -> int | str:
    return int(result.voxels[0, 0, 0]) if isinstance(result, PackedImage) else result.message


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_cases(tmp_path: Path, workers: int) -> None:
    found = list(load_in_order(NumberReader(tmp_path), cases(tmp_path, 8), create_engine(workers)))
    assert [(number_of(case), voxels(result)) for case, result in found] == [(number, number) for number in range(8)]


@pytest.mark.parametrize("workers", [1, 3])
def test_cases_are_taken_only_a_few_ahead(tmp_path: Path, workers: int) -> None:
    taken = 0

    def endless() -> Iterator[Case]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield Case(f"scan_{number}", "p", "train", (tmp_path,), "", "")

    with closing(load_in_order(NumberReader(tmp_path), endless(), create_engine(workers))) as results:
        for yielded in range(1, 8):
            next(results)
            assert taken <= yielded + 2 * workers
    assert [child for child in multiprocessing.active_children() if child.name == "scan-worker"] == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_scan_that_cannot_be_read_is_a_value(tmp_path: Path, workers: int) -> None:
    count = len(DamagedReader.problems)
    results = [result for _, result in load_in_order(DamagedReader(), cases(tmp_path, count), create_engine(workers))]
    assert all(isinstance(result, Failure) and result.path == str(tmp_path) for result in results)
    words = ("bits are missing", "not enough memory", "OSError: Input", "TypeError: a decoder", "RuntimeError: another")
    assert all(word in result.message for word, result in zip(words, results, strict=True))
    assert all(result.remedy for result in results)


def test_a_scan_that_kills_its_worker_costs_only_itself(tmp_path: Path) -> None:
    reader = NumberReader(tmp_path, kills=(2, 5))
    found = [voxels(result) for _, result in load_in_order(reader, cases(tmp_path, 8), create_engine(2))]
    assert [entry for entry in found if isinstance(entry, int)] == [0, 1, 3, 4, 6, 7]
    assert all("the worker reading it was killed (often out of memory" in str(found[number]) for number in (2, 5))


def test_a_scan_whose_worker_died_is_read_again_with_nothing_beside_it(tmp_path: Path) -> None:
    reader = NumberReader(tmp_path, kills_once=(1, 4))
    results = dict(enumerate(result for _, result in load_in_order(reader, cases(tmp_path, 10), create_engine(3))))
    assert [voxels(result) for result in results.values()] == list(range(10))
    packed = {number: result for number, result in results.items() if isinstance(result, PackedImage)}
    assert packed[1].record["others"] == packed[4].record["others"] == 0


def test_workers_compute_with_one_thread_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    ((_, result),) = load_in_order(NumberReader(tmp_path), cases(tmp_path, 1), create_engine(2))
    assert isinstance(result, PackedImage)
    assert result.record["threads"] == "1" and result.record["pid"] != os.getpid()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_worker_that_cannot_start_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="ended before its first scan"):
        list(load_in_order(UnstartableReader(tmp_path), cases(tmp_path, 3), create_engine(2)))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_run(tmp_path: Path, sent: signal.Signals) -> None:
    lines = (
        "import signal, sys; from pathlib import Path",
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it",
        f"sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]",
        "from engine_readers import SleepingReader, cases",
        "from prepro.engines import create_engine, load_in_order",
        "if __name__ == '__main__':",
        "    folder = Path(sys.argv[1])",
        "    list(load_in_order(SleepingReader(folder), cases(folder, 9), create_engine(2)))",
    )
    (tmp_path / "job.py").write_text("\n".join(lines))
    job = subprocess.Popen([sys.executable, tmp_path / "job.py", tmp_path], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: len(list(tmp_path.glob("pid_*"))) == 2)
        workers = [int(path.name[4:]) for path in tmp_path.glob("pid_*")]
        job.send_signal(sent)
        job.wait(timeout=60)
    finally:
        job.kill()
    assert wait_for(lambda: all(gone(pid) for pid in workers))


def test_no_scheduler_is_said_in_a_few_lines(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1)
    command = [sys.executable, SCRIPT, "ct_rate", "--root", root, "--out", tmp_path / "out", "--scheduler", NOBODY]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 2
    assert f"no Dask scheduler answers at {NOBODY}" in done.stderr and "dask scheduler" in done.stderr
    assert len(done.stderr.splitlines()) <= 5 and "Traceback" not in done.stderr


def test_an_absent_scheduler_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"none\.json is neither an address nor the file"):
        create_engine(1, str(tmp_path / "none.json"))


def test_absent_dask_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'dask\[distributed\]'"):
        create_engine(1, NOBODY)


def test_a_machine_with_other_code_or_without_the_data_is_refused(tmp_path: Path) -> None:
    reader = NumberReader(tmp_path)
    (case,) = cases(tmp_path, 1)
    good = remote.Job(reader, remote.VERSIONS, str(tmp_path))
    assert remote.complaint(good) == "" and voxels(remote.read_case(good, case)) == 0
    older = remote.Job(reader, remote.VERSIONS | {"code": "0123"}, str(tmp_path))
    elsewhere = remote.Job(reader, remote.VERSIONS, str(tmp_path / "elsewhere"))
    assert "instead of 0123" in remote.complaint(older)
    for job, words in ((older, "instead of 0123"), (elsewhere, "does not see")):
        with pytest.raises(RuntimeError, match=words):
            remote.read_case(job, case)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """File of a scheduler with two worker processes, started as a user does, from a folder without our code."""
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    log = (folder / "log").open("w")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}  # the readers above, not the project
    quiet = {"cwd": folder, "env": environment, "stdout": log, "stderr": log}
    dask = [sys.executable, "-m", "dask"]
    place = ["--scheduler-file", str(file), "--no-dashboard"]
    started = [subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *place], **quiet)]
    try:
        assert wait_for(file.exists)
        workers = ["worker", "--nworkers", "2", "--nthreads", "1", "--local-directory", str(folder)]
        started.append(subprocess.Popen([*dask, *workers, *place], **quiet))
        yield str(file)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
        log.close()


def pack(root: Path, out: Path, *where: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "ct_rate", "--root", root.name, "--out", out, *SIZE, *where]
    return subprocess.run(command, cwd=root.parent, capture_output=True, encoding="utf-8", timeout=300, check=False)


@pytest.mark.slow
def test_a_dask_cluster_writes_the_same_bytes_as_two_workers(cluster: str, tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=8, valid=2)
    next((root / "dataset" / "train").rglob("train_3_a_1.nii.gz")).write_bytes(b"no volume")
    outs = {}
    for name, where in (("pool", ("--workers", "2")), ("cluster", ("--scheduler", cluster))):
        done = pack(root, tmp_path / name, *where)
        assert done.returncode == 1, done.stderr
        outs[name] = json.loads(done.stdout)
    assert outs["pool"]["rows"] == outs["cluster"]["rows"] and outs["cluster"]["failed"] == 1
    files = sorted(path.name for path in (tmp_path / "pool").iterdir())
    assert len(files) >= 6
    assert files == sorted(path.name for path in (tmp_path / "cluster").iterdir())
    for file in files:
        assert (tmp_path / "pool" / file).read_bytes() == (tmp_path / "cluster" / file).read_bytes(), file


@pytest.mark.slow
def test_on_a_cluster_too_a_deadly_scan_costs_only_itself(cluster: str, tmp_path: Path) -> None:
    reader = NumberReader(tmp_path, kills=(3,))
    found = [voxels(result) for _, result in load_in_order(reader, cases(tmp_path, 8), create_engine(1, cluster))]
    assert [entry for entry in found if isinstance(entry, int)] == [0, 1, 2, 4, 5, 6, 7]
    assert "the worker reading it was killed" in str(found[3])


@pytest.mark.slow
def test_a_cluster_with_other_code_is_refused(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "VERSIONS", remote.VERSIONS | {"code": "0123"})
    with pytest.raises(EnvironmentProblem, match="instead of 0123"):
        list(load_in_order(NumberReader(tmp_path), cases(tmp_path, 2), create_engine(1, cluster)))
