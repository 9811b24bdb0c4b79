"""Two runs that prepare the same folder: the second waits, and finds everything done."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mg3d.errors import OutputError
from mg3d.finetuning.preparation import prepare_data, write_phantom


class Slow:
    """A benchmark that takes its time and counts."""

    name = "slow"

    def __init__(self) -> None:
        self.written = self.inside = self.most = 0
        self.prepare: Any = self._prepare

    def write_phantom(self, root: Path, seed: int) -> None:
        self.written += 1
        (root / "half").touch()
        time.sleep(0.3)
        (root / "half").rename(root / "whole")

    def _prepare(self, cfg: Any) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.2)
        self.inside -= 1


def config(tmp_path: Path) -> Any:
    places = {"data_root": str(tmp_path / "data"), "work_dir": str(tmp_path / "deep" / "work")}
    return SimpleNamespace(phantom=True, phantom_seed=0, stages=("prepare",), **places)


def test_phantoms_are_written_once_and_preparations_take_turns(tmp_path: Path) -> None:
    slow, cfg = Slow(), config(tmp_path)
    pair = [threading.Thread(target=prepare_data, args=(slow, cfg)) for _ in range(2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert slow.written == 1 and slow.most == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failed_phantom_leaves_nothing(tmp_path: Path) -> None:
    slow, cfg = Slow(), config(tmp_path)

    def full(root: Path, seed: int) -> None:
        (root / "half").touch()
        raise OSError(28, "No space left on device")

    slow.write_phantom = full  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="data") as caught:
        write_phantom(slow, cfg)  # type: ignore[arg-type]
    assert caught.value.exit_code == 1 and list(tmp_path.iterdir()) == []
