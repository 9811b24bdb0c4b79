"""``tools/report_gallery.py``: a page from a run's folder, with pictures or without, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tools.command import answer, modules_after, refusal
from tools.report_gallery import main

ROWS = [
    {"filename": "a", "ground_truth": "cardiomegaly is present .", "prediction": "emphysema is present ."},
    {"filename": "b", "ground_truth": "no emphysema .", "prediction": ""},
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "name" / "version_0"
    folder.mkdir(parents=True)
    (folder / "generated.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "per_case.csv").write_text("id,label_to_report\na,cardiomegaly is present .\nb,\n", encoding="utf-8")
    return folder


def test_a_folder_with_texts_is_enough(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, main, run_dir)
    assert told["shown"] == 2 and told["pictures"] == 0 and told["labeller"] == "keywords"
    assert "no pictures" in told["told"]
    text = (run_dir / "gallery.html").read_text(encoding="utf-8")
    assert "name/version_0" in text and text.count("<summary>label-to-report</summary>") == 1
    (run_dir / "config.json").write_text('{"phantom": true}', encoding="utf-8")
    assert answer(capsys, main, run_dir, "--no-pictures")["labeller"] == "phantom"


def test_volumes_of_a_folder_are_drawn(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 8), dtype=np.float32))
    told = answer(capsys, main, run_dir, "--volumes", tmp_path, "--out", tmp_path / "page.html", "--cases", 2)
    assert told["pictures"] == 1 and told["bytes"] == (tmp_path / "page.html").stat().st_size
    (tmp_path / "b.npy").write_bytes(b"no numbers")
    assert "not an array" in refusal(capsys, main, run_dir, "--volumes", tmp_path)


def test_what_cannot_be_drawn_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no generated.json" in refusal(capsys, main, tmp_path)
    assert "no such folder" in refusal(capsys, main, run_dir, "--volumes", tmp_path / "absent")
    assert "no score" in refusal(capsys, main, run_dir, "--order-by", "meteor", "--no-pictures")
    assert "at least one" in refusal(capsys, main, run_dir, "--cases", "0", "--no-pictures")
    (run_dir / "generated.json").write_text('[{"name": "a"}]', encoding="utf-8")
    assert "no ref (nor reference, ground_truth), no hyp" in refusal(capsys, main, run_dir)


def test_help_imports_nothing_heavy(repository: Path) -> None:
    assert modules_after(repository, "tools.report_gallery", "--help") == (0, set())
