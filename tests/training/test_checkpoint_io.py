"""Checkpoint files: whole or absent, verified, tensors and plain types only."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import shutil
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from mg3d.atomic import this_host
from mg3d.errors import CheckpointError, RunFailedError
from mg3d.training import checkpoint_io
from mg3d.training.checkpoint_io import (
    AtomicCheckpointIO,
    check_file,
    load_file,
    newest_checkpoint,
    read_sidecar,
    remove_leftovers,
    save_file,
    sidecar_path,
    to_safe,
)


def content(step: int = 1, full: bool = True, size: int = 1000) -> dict[str, Any]:
    tree = {"global_step": step, "epoch": 0, "state_dict": {"weight": torch.arange(float(size))}}
    return {**tree, "optimizer_states": []} if full else tree


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".") or entry.suffix == ".tmp"]


def flip_bit(path: Path, seed: int) -> None:
    data = bytearray(path.read_bytes())
    position = random.Random(seed).randrange(len(data))
    data[position] ^= 1 << (seed % 8)
    path.write_bytes(bytes(data))


def test_round_trip_with_a_digest_that_sha256sum_accepts(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(step=7), path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["weight"], torch.arange(1000.0))
    digests, note = read_sidecar(path)
    assert digests == [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert note == {"step": 7, "epoch": 0, "kind": "full"}
    subprocess.run(["sha256sum", "--check", sidecar_path(path).name], cwd=tmp_path, check=True, capture_output=True)
    assert leftovers(tmp_path) == []


def test_unusual_leaves_become_plain_and_load_with_weights_only(tmp_path: Path) -> None:
    read_only = MappingProxyType({"path": Path("a/b"), "scale": np.float64(0.5), "flag": np.bool_(True)})
    tree = {
        "hyper_parameters": read_only,
        "ordered": OrderedDict(a=(1, np.int64(2))),
        "array": np.arange(3.0),
        "device": torch.device("cpu"),
        "names": {"x", "y"},
    }
    save_file(tree, tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert loaded["hyper_parameters"] == {"path": "a/b", "scale": 0.5, "flag": True}
    assert type(loaded["hyper_parameters"]["scale"]) is float
    assert loaded["ordered"] == {"a": (1, 2)} and loaded["names"] == {"x", "y"}
    assert torch.equal(loaded["array"], torch.arange(3.0, dtype=torch.float64))


def test_a_leaf_that_cannot_be_loaded_safely_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.callbacks\.mine is a object"):
        save_file({"callbacks": {"mine": object()}}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_to_safe_keeps_tensors_without_copying() -> None:
    tensor = torch.zeros(3)
    assert to_safe({"t": tensor})["t"].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_is_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.ckpt"
    save_file(content(), path)
    flip_bit(path, seed)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load_file(path)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("with_sidecar", [True, False])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float, with_sidecar: bool) -> None:
    path = tmp_path / "a.ckpt"
    save_file(content(), path)
    os.truncate(path, int(path.stat().st_size * part))
    if not with_sidecar:
        sidecar_path(path).unlink()
    with pytest.raises(CheckpointError, match=r"a\.ckpt: (empty file|its sha256|not a whole checkpoint)"):
        load_file(path)


def test_without_a_sidecar_the_checksums_inside_the_file_decide(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_file(content(), path)
    sidecar_path(path).unlink()
    assert check_file(path) == ""
    with zipfile.ZipFile(path) as archive:
        tensor = next(entry for entry in archive.infolist() if entry.file_size == 4000)
    data = bytearray(path.read_bytes())
    data[tensor.header_offset + 2000] ^= 1
    path.write_bytes(bytes(data))
    assert "damaged" in check_file(path)


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    torch.save({"state_dict": _Evil(marker)}, path)
    with pytest.raises(CheckpointError, match="refused"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not marker.exists()


def test_something_else_than_a_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_file(tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="no such file"):
        load_file(tmp_path / "absent.ckpt")


def test_a_full_disk_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_file(content(step=1), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunFailedError, match=r"cannot write .*last\.ckpt: .*KiB needed, .* free") as caught:
            save_file(content(step=2, size=100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert path.read_bytes() == before and check_file(path) == ""
    assert leftovers(tmp_path) == []


def test_a_disk_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(RunFailedError, match=r"about 4\.7 KiB needed, 1,000 bytes free"):
        save_file(content(), tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_rename_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save_file(content(step=1), path)
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if str(target).endswith(".ckpt"):
            raise OSError(errno.EROFS, "read-only file system")
        replace(source, target)

    monkeypatch.setattr(checkpoint_io.os, "replace", refuse)
    with pytest.raises(RunFailedError, match="Read-only file system"):
        save_file(content(step=2), path)
    monkeypatch.undo()
    assert load_file(path)["global_step"] == 1  # the sidecar written for the new file still accepts the old one
    assert leftovers(tmp_path) == []


def test_newest_skips_what_does_not_verify_and_says_why(tmp_path: Path) -> None:
    older, newer = tmp_path / "version_0", tmp_path / "version_1"
    io = AtomicCheckpointIO()
    io.save_checkpoint(content(step=30), older / "last.ckpt")
    io.save_checkpoint(content(step=10), newer / "best.ckpt")
    io.save_checkpoint(content(step=20), newer / "last.ckpt")
    assert newest_checkpoint([newer, older]).path == newer / "last.ckpt"
    flip_bit(newer / "last.ckpt", 3)
    choice = newest_checkpoint([newer, older])
    assert choice.path == newer / "best.ckpt"
    assert choice.skipped == ((newer / "last.ckpt", "its sha256 differs from the sidecar"),)
    flip_bit(newer / "best.ckpt", 4)
    assert newest_checkpoint([newer, older]).path == older / "last.ckpt"
    io.save_checkpoint(content(step=40, full=False), older / "last.ckpt")
    with pytest.raises(CheckpointError, match="weights only"):
        newest_checkpoint([newer, older])


def test_two_kills_before_the_rename_leave_the_old_file_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    save_file(content(step=1), path)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith(".ckpt"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(checkpoint_io.os, "replace", killed)
    for step in (2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            save_file(content(step=step), path)
        assert check_file(path) == "" and load_file(path)["global_step"] == 1
    monkeypatch.undo()
    save_file(content(step=5), path)
    assert load_file(path)["global_step"] == 5 and len(read_sidecar(path)[0]) == 1


def test_removal_takes_the_sidecar_along_and_leftovers_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_file(content(), path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f".a.ckpt.{this_host()}-{ended.pid}-0123abcd.tmp").write_bytes(b"half")
    assert [entry.suffix for entry in remove_leftovers(tmp_path)] == [".tmp"] and leftovers(tmp_path) == []
    AtomicCheckpointIO().remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []
