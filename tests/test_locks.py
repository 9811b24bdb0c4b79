"""Two processes never write one output: the second one is refused with the name of the first, or waits."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mg3d import locks
from mg3d.atomic import this_host
from mg3d.errors import EnvironmentProblem
from mg3d.locks import FileLock, exclusive_output

HOLD = """
import sys, time
from pathlib import Path
from mg3d.locks import exclusive_output
with exclusive_output(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(repository: Path, path: Path, seconds: float = 60.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_writer_is_refused_with_host_and_process_of_the_first(tmp_path: Path, repository: Path) -> None:
    process = holder(repository, tmp_path / "out")
    try:
        with pytest.raises(EnvironmentProblem, match=f"host {this_host()}, process {process.pid}") as caught:
            with exclusive_output(tmp_path / "out"):
                raise AssertionError("must not be reached")
        assert caught.value.exit_code == 2
        with exclusive_output(tmp_path / "other"):
            pass
    finally:
        process.kill()
        process.wait()
    with exclusive_output(tmp_path / "out"):  # a killed process gives its lock back
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_second_writer_can_wait(tmp_path: Path, repository: Path) -> None:
    process = holder(repository, tmp_path / "out", 0.5)
    with exclusive_output(tmp_path / "out", wait=True):
        assert process.wait() == 0


def test_one_output_under_two_names_is_one_output(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with exclusive_output(tmp_path / "real" / "out"):
        for same in (tmp_path / "link" / "out", tmp_path / "real" / ".." / "real" / "out"):
            with pytest.raises(EnvironmentProblem), exclusive_output(same):
                pass


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot write in") as caught:
        with exclusive_output(tmp_path / "file" / "out", what="--there"):
            pass
    assert "--there" in caught.value.remedy
    with exclusive_output(tmp_path / "new" / "parent" / "out"):
        assert (tmp_path / "new" / "parent").is_dir()


def test_standard_output_and_devices_need_no_lock() -> None:
    with exclusive_output(Path(os.devnull)), exclusive_output(Path(os.devnull)):
        assert not list(Path("/dev").glob(".null*"))


def test_forked_processes_that_outlive_the_holder_do_not_keep_the_lock(tmp_path: Path) -> None:
    lock, context = FileLock(tmp_path / "lock"), multiprocessing.get_context("fork")
    assert lock.acquire()
    child = context.Process(target=time.sleep, args=(30,))
    child.start()
    try:
        os.close(lock._descriptor)  # as the kernel does when the holder is killed
        deadline = time.monotonic() + 20
        while not FileLock(tmp_path / "lock").acquire():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_a_lock_is_seen_without_being_touched(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert not other.is_held() and not lock.path.exists()
    lock.acquire()
    assert other.is_held()
    lock.release()
    assert not other.is_held()


def test_without_locks_a_living_signer_of_this_host_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    path = tmp_path / ".out.lock"
    path.write_text(f"{this_host()} {os.getppid()} \n")
    with pytest.raises(EnvironmentProblem, match=str(os.getppid())), exclusive_output(tmp_path / "out"):
        pass
    ended = subprocess.Popen(["true"])
    ended.wait()
    for text in (f"{this_host()} {ended.pid} \n", f"another_host {os.getppid()} \n", "", "nonsense \x1b[31m"):
        path.write_text(text)
        with exclusive_output(tmp_path / "out"):
            pass
    assert "no locks here" in caplog.text


def test_an_unsigned_lock_is_still_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with exclusive_output(tmp_path / "out"), pytest.raises(EnvironmentProblem), exclusive_output(tmp_path / "out"):
        pass
