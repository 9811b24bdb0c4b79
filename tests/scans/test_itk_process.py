"""ITK in a child process: crashes, hangs and greed of a file end in an error that names it; the parent goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from prepro_builders import chest
from scan_files import axial_series, save_volume

from mg3d.errors import DataError
from mg3d.scans import itk_process
from mg3d.scans.itk_image import read_image, read_information
from mg3d.scans.read import read_scan


@pytest.fixture(autouse=True)
def fresh_child() -> None:
    itk_process._keeper.stop()


def child_pid() -> int:
    child = itk_process._keeper.child
    assert child is not None
    return child._process.pid


def test_no_reader_brings_itk_into_its_own_process(tmp_path: Path, repository: Path) -> None:
    for name in ("a.nrrd", "a.mha", "a.nii.gz"):
        save_volume(tmp_path / name, chest())
    axial_series(tmp_path / "s", chest())
    program = (
        "import sys; from pathlib import Path; from mg3d.scans.read import read_scan\n"
        "for place in sys.argv[1:]: print(read_scan(Path(place)).voxels_xyz.shape)\n"
        "sys.exit('SimpleITK' in sys.modules)"
    )
    places = [str(tmp_path / name) for name in ("a.nrrd", "a.mha", "a.nii.gz", "s")]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", program, *places], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stdout.count(str(chest().shape).encode()), done.stderr) == (0, 4, b"")


def test_only_the_child_imports_simple_itk(repository: Path) -> None:
    listed = subprocess.run(
        [
            "git",
            "grep",
            "-lE",
            r"^\s*(import|from) SimpleITK",
            "--",
            "mg3d",
            "prepro",
            "tools",
            "downstream",
            "main.py",
        ],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert listed.stdout.split() == ["mg3d/scans/itk_child.py"]


def test_one_child_serves_many_files(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.nrrd", chest())
    read_information(path, "NrrdImageIO")
    first = child_pid()
    with pytest.raises(DataError, match="cannot be read"):
        read_information(path, "MetaImageIO")
    assert read_information(path, "NrrdImageIO").size == chest().shape
    assert child_pid() == first


def test_a_child_killed_between_two_files_is_replaced(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.mha", chest())
    read_scan(path)
    first = child_pid()
    os.kill(first, signal.SIGKILL)
    np.testing.assert_array_equal(read_scan(path).voxels_xyz, chest())
    assert child_pid() != first


def _with_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Let the child run other code where it would read a header."""
    program = itk_process.PROGRAM.read_text(encoding="utf-8")
    head, tail = program.split("    reader = _reader(request", 1)
    (tmp_path / "child.py").write_text(f"{head}    {body}\n    reader = _reader(request{tail}", encoding="utf-8")
    monkeypatch.setattr(itk_process, "PROGRAM", tmp_path / "child.py")


@pytest.mark.parametrize("how", ["os.abort()", "os.kill(os.getpid(), signal.SIGSEGV)", "os._exit(3)"])
def test_a_crash_names_the_file_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    good, bad = save_volume(tmp_path / "good.mha", chest()), save_volume(tmp_path / "bad.mha", chest())
    _with_program(monkeypatch, tmp_path, f"if 'bad' in request['path']: {how}")
    with pytest.raises(DataError, match="crashed") as caught:
        read_scan(bad)
    assert caught.value.path == str(bad) and caught.value.remedy
    np.testing.assert_array_equal(read_scan(good).voxels_xyz, chest())


@pytest.mark.parametrize(
    "body", ["import time; time.sleep(600)", "while True: pass", "signal.alarm(0); signal.pause()"]
)
def test_a_hang_ends_in_time_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    path = save_volume(tmp_path / "a.mha", chest())
    _with_program(monkeypatch, tmp_path, body)
    monkeypatch.setattr(itk_process, "GRACE_SECONDS", 1)
    with pytest.raises(DataError, match="too long") as caught:
        itk_process.ask("information", str(path), image_io="MetaImageIO", seconds=1)
    assert caught.value.path == str(path)
    assert itk_process._keeper.child is None


def test_memory_beyond_what_the_header_promises_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_volume(tmp_path / "a.mha", chest())
    _with_program(monkeypatch, tmp_path, "bytearray(2 << 30)")
    with pytest.raises(DataError, match="more memory than") as caught:
        read_scan(path)
    assert caught.value.path == str(path)


def _read_in_child(path: Path, queue: multiprocessing.Queue[object]) -> None:
    queue.put((read_scan(path).voxels_xyz.shape, child_pid()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_daemonic_process_starts_its_own_child(tmp_path: Path, method: str) -> None:
    path = save_volume(tmp_path / "a.mha", chest())
    read_scan(path)
    own = child_pid()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_in_child, args=(path, queue), daemon=True)
    worker.start()
    shape, pid = queue.get(timeout=120)
    worker.join(60)
    assert (shape, worker.exitcode) == (chest().shape, 0) and pid != own
    assert read_scan(path).voxels_xyz.shape == chest().shape and child_pid() == own
    assert _gone(pid)


def _gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
            if state == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(tmp_path: Path, repository: Path, end: signal.Signals) -> None:
    path = save_volume(tmp_path / "a.mha", chest())
    program = (
        "import sys, time; from pathlib import Path; from mg3d.scans import itk_process; "
        "from mg3d.scans.read import read_scan; read_scan(Path(sys.argv[1])); "
        "print(itk_process._keeper.child._process.pid, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(repository)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not _gone(pid, 0.2)
        parent.send_signal(end)
        parent.wait(60)
    assert _gone(pid)


def test_an_image_of_any_format_comes_with_its_voxels(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.mha", chest())
    voxels, header = read_image(path, 1 << 28)
    np.testing.assert_array_equal(voxels.transpose(2, 1, 0), chest())
    assert header.spacing == (2.0, 2.5, 3.0) and voxels.flags.writeable
