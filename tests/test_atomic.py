"""Files and folders are written whole or not at all, and leftovers are told from work in progress."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mg3d import atomic
from mg3d.atomic import (
    atomic_folder,
    atomic_path,
    is_abandoned,
    remove_abandoned,
    this_host,
    write_text_atomically,
    writing,
)
from mg3d.errors import DataError, MG3DError, OutputError
from tests.full_disk import small_files


def dead_process() -> int:
    """Number of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def temporary(folder: Path, name: str, host: str, pid: int) -> Path:
    path = folder / f".{name}.{host}-{pid}-0123abcd.tmp"
    path.write_bytes(b"half")
    return path


def old(path: Path) -> Path:
    long_ago = time.time() - 2 * atomic.FOREIGN_SECONDS
    os.utime(path, (long_ago, long_ago))
    return path


def numpy_file(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros(100_000))


WRITERS: dict[str, Any] = {
    "text": lambda path: path.write_text("a" * 200_000),
    "numpy": numpy_file,
    "torch": lambda path: torch.save({"a": torch.zeros(100_000)}, path),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "picture": lambda path: Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (300, 300)).astype(np.uint8)
    ).save(path, format="PNG"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_gives_one_message_and_leaves_the_older_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.bin"
    path.write_text("older")
    with small_files(10_000), pytest.raises(OutputError) as caught, atomic_path(path) as partial:
        WRITERS[kind](partial)
    assert caught.value.path == str(path) and caught.value.exit_code == 1
    assert "free" in str(caught.value) and str(partial) not in str(caught.value)
    assert path.read_text(encoding="utf-8") == "older" and list(tmp_path.iterdir()) == [path]


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"about .* GiB needed, .* free"), atomic_path(tmp_path / "a", needed=1 << 60):
        raise AssertionError("must not be reached")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_content_is_no_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="odd"), atomic_path(tmp_path / "a"):
        raise ValueError("odd")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path.parent / "no such input").read_text(encoding="utf-8")
    with pytest.raises(DataError), atomic_folder(tmp_path / "b"):
        raise DataError("bad scan")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_and_a_refused_one_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="No such file"), atomic_path(tmp_path / "none" / "a"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught, atomic_folder(tmp_path / "file" / "b"):
        pass
    assert caught.value.path == str(tmp_path / "file" / "b")

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    monkeypatch.setattr(atomic.os, "open", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        write_text_atomically(tmp_path / "a", "text")


def test_a_folder_takes_the_place_of_an_older_one_and_a_failure_leaves_that(tmp_path: Path) -> None:
    out = tmp_path / "new parent" / "out"
    with atomic_folder(out) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(out) as partial:
        (partial / "a").write_text("2")
        raise RuntimeError("stopped")
    assert (out / "a").read_text(encoding="utf-8") == "1"
    with small_files(10_000), pytest.raises(OutputError) as caught, atomic_folder(out) as partial:
        save_file({"a": torch.zeros(100_000)}, partial / "weights")
    assert caught.value.path == str(out)
    with atomic_folder(out) as partial:
        (partial / "b").write_text("3")
    assert [entry.name for entry in out.iterdir()] == ["b"] and list(out.parent.iterdir()) == [out]


def test_an_inner_file_that_cannot_be_written_names_the_folder_of_the_user(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with small_files(10_000), pytest.raises(OutputError) as caught, atomic_folder(out) as partial:
        with atomic_path(partial / "inner") as inner:
            inner.write_bytes(bytes(50_000))
    assert caught.value.path == str(out) and list(tmp_path.iterdir()) == []


def test_a_device_is_written_as_it_is_and_never_replaced() -> None:
    write_text_atomically(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()


def test_long_and_odd_names_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 250, "\u00e9" * 120, "a\nb \x1b[31m", os.fsdecode(b"\xff\xfe")):
        write_text_atomically(tmp_path / name, "text")
        assert (tmp_path / name).read_text(encoding="utf-8") == "text"
    assert len(list(tmp_path.iterdir())) == 4


def test_permissions_follow_the_mask_of_the_process(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomically(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_only_what_a_dead_process_of_this_host_left_is_removed(tmp_path: Path) -> None:
    gone = temporary(tmp_path, "out", this_host(), dead_process())
    living = temporary(tmp_path, "out", this_host(), os.getppid())
    foreign = temporary(tmp_path, "out", "another_host", dead_process())
    older_version = tmp_path / ".out.99.tmp"
    older_version.write_bytes(b"half")
    other_output = temporary(tmp_path, "other", this_host(), dead_process())
    unrelated = tmp_path / ".hidden"
    unrelated.touch()
    assert remove_abandoned(tmp_path, "out") == [gone]
    assert all(path.exists() for path in (living, foreign, older_version, other_output, unrelated))
    assert remove_abandoned(tmp_path) == [other_output]


def test_what_another_host_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = temporary(tmp_path, "out", "another_host", 1)
    now = time.time()
    monkeypatch.setattr(atomic.time, "time", lambda: now - 10**6)  # a clock that was set back
    assert not is_abandoned(foreign)
    monkeypatch.setattr(atomic.time, "time", lambda: now + atomic.FOREIGN_SECONDS + 60)
    assert remove_abandoned(tmp_path) == [foreign]


WRITE_SLOWLY = """
import sys, time
from pathlib import Path
from mg3d.atomic import atomic_path
with atomic_path(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print(partial, flush=True)
    time.sleep(60)
"""


def test_a_file_being_written_is_kept_whoever_its_name_says_writes_it(tmp_path: Path, repository: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "out")],
        cwd=repository,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None
    partial = Path(process.stdout.readline().strip())
    renamed = partial.with_name(f".out.another_host-{dead_process()}-0123abcd.tmp")
    os.link(partial, renamed)
    try:
        assert not is_abandoned(partial) and not is_abandoned(old(renamed))
    finally:
        process.kill()
        process.wait()
    renamed.unlink()
    assert remove_abandoned(tmp_path, "out") == [partial] and list(tmp_path.iterdir()) == []


def test_without_locks_nothing_young_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = temporary(tmp_path, "out", this_host(), dead_process())

    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", unsupported)
    assert not is_abandoned(path)
    write_text_atomically(tmp_path / "still", "written")


def test_an_output_error_survives_the_way_from_a_worker(tmp_path: Path) -> None:
    error = OutputError(tmp_path / "a", "No space left on device", "free some")
    kind, arguments = error.__reduce__()[:2]
    again = kind(*arguments)
    assert str(again) == str(error) and again.path == error.path


def test_writing_leaves_the_projects_own_errors_alone(tmp_path: Path) -> None:
    with pytest.raises(MG3DError, match="os error 28 in a name") as caught, writing(tmp_path):
        raise DataError("os error 28 in a name")
    assert type(caught.value) is DataError
