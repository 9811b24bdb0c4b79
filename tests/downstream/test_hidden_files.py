"""The ``._NAME`` files that macOS leaves in archives are no data: no benchmark's check or preparation looks at them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from folders import DOWNSTREAM, load_folder

from mg3d.finetuning.experiment import run_benchmark

COMPANION = b"\0\5\26\7\0\2\0\0Mac OS X        " + bytes(200)
NAMES = sorted(path.parent.name for path in DOWNSTREAM.glob("*/main.py"))


def sprinkle(root: Path) -> int:
    """Put a companion beside every file, and into every zip file."""
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in files:
        (path.parent / f"._{path.name}").write_bytes(COMPANION)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "a") as archive:
                for name in archive.namelist():
                    folder, _, last = name.rpartition("/")
                    archive.writestr(f"{folder}/._{last}", COMPANION)
                    archive.writestr(f"__MACOSX/{folder}/._{last}", COMPANION)
    return len(files)


@pytest.mark.parametrize("name", NAMES)
def test_the_check_and_the_preparation_pass_over_hidden_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark: Any = load_folder(name).BENCHMARK
    root = tmp_path / "raw"
    benchmark.write_phantom(root, 0)
    assert sprinkle(root) > 5
    words = ["with", "phantom", f"data_root={root}", f"log_dir={tmp_path / 'log'}", f"work_dir={tmp_path / 'work'}"]
    assert run_benchmark(benchmark, ["--check-data", *words]) == 0, capsys.readouterr().err
    assert run_benchmark(benchmark, [*words, "stages=[prepare]"]) == 0, capsys.readouterr().err
    assert [path.name for path in (tmp_path / "work").rglob("._*")] == []
    assert not any(json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "work").rglob("failures.json"))
