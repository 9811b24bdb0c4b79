"""What a run prints at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mg3d.training.console import print_result

RESULT = {"steps": 3, "metrics": {"val/the_metric": {"mean": -1.5}, "zero_shot_auroc": None, "image_text_space": "x"}}


def test_the_last_line_is_json_and_the_table_stands_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "evaluation.txt").write_text("the table\n")
    print_result({"run_dir": str(tmp_path), **RESULT})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the table"
    assert json.loads(lines[-1]) == {"run_dir": str(tmp_path), "steps": 3, "val/the_metric": -1.5}


def test_other_ranks_print_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    print_result({"run_dir": str(tmp_path), **RESULT})
    assert capsys.readouterr().out == ""
