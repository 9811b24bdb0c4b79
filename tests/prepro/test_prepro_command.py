"""The command as a user runs it: from another folder, with mistakes, and when it breaks down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prepro_builders import ct_rate_tree, ctrg_tree

from mg3d.errors import DataError
from prepro.command_line import build_parser
from prepro.job import run

SCRIPT = Path(__file__).resolve().parents[2] / "prepro" / "prepro_pretraining_data.py"
SIZE = ("--image-size", "8", "6", "8", "--target-spacing", "none")


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def _run(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=_environment(), capture_output=True, encoding="utf-8", timeout=120, check=False
    )


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_rate_tree(tmp_path_factory.mktemp("a download with blanks"), train=3, valid=1)


def test_help_needs_no_torch(tmp_path: Path) -> None:
    probe = (
        f"import runpy, sys; sys.argv = ['p', 'ct_rate', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        f"except SystemExit: pass\n"
        f"sys.exit(any(name in sys.modules for name in ('torch', 'monai', 'pyarrow', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0
    assert "--split-protocol" in done.stdout


def test_runs_from_any_folder_and_ends_with_one_json_line(download: Path, tmp_path: Path) -> None:
    done = _run(tmp_path, "ct_rate", "--root", download, "--out", "out", *SIZE, "--workers", 2)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["rows"] == {"train": 2, "val": 1, "test": 1}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    splits = ("train", "val", "test")
    wanted = {f"clm_ct_rate_{split}{end}" for split in splits for end in (".arrow", ".manifest.json")}
    wanted.add("clm_ct_rate.manifest.json")
    assert names == wanted
    assert "scan/s" in done.stderr


def test_packing_needs_no_torch(download: Path, tmp_path: Path) -> None:
    arguments = ["ct_rate", "--root", str(download), "--out", str(tmp_path / "out"), *SIZE, "--workers", "1"]
    probe = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent.parent)!r})\n"
        f"from prepro.prepro_pretraining_data import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _without_column(root: Path) -> None:
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("Findings_EN", "Findings"))


def _without_reports(root: Path) -> None:
    (root / "dataset" / "radiology_text_reports" / "train_reports.csv").unlink()


def _with_path_as_name(root: Path) -> None:
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("train_1_a_1", "../../train_1_a_1"))


def _with_odd_label(root: Path) -> None:
    table = root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(",1,", ",yes,", 1))


def _all_damaged(root: Path) -> None:
    for path in root.rglob("*.nii.gz"):
        path.write_bytes(b"")


def _moved_patient(root: Path) -> None:
    for kind in ("radiology_text_reports/validation_reports.csv", "metadata/validation_metadata.csv"):
        table = root / "dataset" / kind
        table.write_text(table.read_text(encoding="utf-8").replace("valid_1_a_1", "train_1_b_1"))
    path = next((root / "dataset" / "valid").rglob("*.nii.gz"))
    path.rename(path.with_name("train_1_b_1.nii.gz"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without_column, "column 'Findings_EN' is missing"),
        (_without_reports, "table not found"),
        (_with_path_as_name, "is a path"),
        (_with_odd_label, "'yes'"),
        (_all_damaged, "no scan could be packed"),
        (_moved_patient, "in more than one split"),
    ],
)
def test_bad_download_is_refused_in_five_lines(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1)
    damage(root)
    options = ["ct_rate", "--root", str(root), "--out", str(tmp_path / "out"), *SIZE, "--workers", "1"]
    with pytest.raises(DataError, match=words) as caught:
        run(build_parser().parse_args([*options, "--val-fraction", "0"]))
    assert len(str(caught.value).splitlines()) <= 5
    assert list((tmp_path / "out").glob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ct_rate", "--root", "nowhere", "--out", "out"), "folder not found"),
        (("ct_rate", "--root", ".", "--out", "out"), "no dataset/train"),
        (("ctrg", "--root", ".", "--annotation", "none.json", "--out", "out"), "annotation not found"),
        (("ctrg", "--root", ".", "--annotation", "list.json", "--out", "out"), "no list of entries"),
        (("ct_rate", "--root", ".", "--out", "out", "--target-spacing", "1", "2"), "not a spacing"),
        (("ct_rate", "--root", ".", "--out", "out", "--image-size", "0", "1", "1"), "--image-size"),
        (("ct_rate", "--root", ".", "--out", "out", "--rescale", "maybe"), "invalid choice"),
        (("mimic",), "invalid choice"),
    ],
)
def test_bad_command_line_exits_2_without_traceback(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "list.json").write_text('{"train": [1, 2]}')
    done = _run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 5
    assert "Traceback" not in done.stderr


def test_a_bad_scan_shows_in_exit_code_and_message(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=4, valid=1)
    bad = next(iter(sorted((root / "dataset" / "train").rglob("*.nii.gz"))))
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 4
    bad.write_bytes(bytes(data))
    arguments = ("ct_rate", "--root", root, "--out", tmp_path / "out", *SIZE, "--workers", 1)
    skipped = _run(tmp_path, *arguments)
    assert skipped.returncode == 1
    assert json.loads(skipped.stdout)["failed"] == 1
    assert "train_1_a_1 left out" in skipped.stderr
    stopped = _run(tmp_path, *arguments, "--on-bad", "stop")
    assert stopped.returncode == 2
    assert "train_1_a_1" in stopped.stderr and "Traceback" not in stopped.stderr


def test_killed_run_leaves_no_file_under_a_final_name(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=60, valid=1)
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "ct_rate", "--root", str(root), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and list(out.glob(".*train*.partial"))) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == []


def test_ctrg_command(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=4, test=1)
    done = _run(tmp_path, "ctrg", "--root", "raw", "--annotation", annotation, "--out", "out", "--image-size", 8, 6, 8)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == {"train": 3, "val": 1, "test": 1}
