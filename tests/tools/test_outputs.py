"""Every command that writes: a busy, full, refused or missing place gives one message, and no half output."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

from downstream import run_all
from mg3d.errors import EnvironmentProblem, OutputError
from mg3d.finetuning.comparison.execute import run_plan
from mg3d.finetuning.comparison.plan import find_benchmarks, make_plan
from mg3d.finetuning.prepared import Job, prepare_arrays
from mg3d.finetuning.text_labels import command as text_labels
from mg3d.locks import exclusive_output
from mg3d.phantoms import __main__ as phantoms
from prepro import verify
from tests.full_disk import small_files
from tests.inference.tiny_weights import checkpoint, chest_hu, save_nifti
from tests.tools.gallery_builders import write_rows
from tools import (
    convert_meter_weights,
    embed,
    explain,
    report_gallery,
    retrieve,
    score_reports,
    score_segmentation,
    visualize_datasets,
    zero_shot,
)

Main = Callable[[list[str]], int]
Command = tuple[Main, list[object], str]
"""A command, its words before and after the output, the output's name."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint(folder / "weights")
    for number, name in enumerate(("chest", "other")):
        save_nifti(folder / "scans" / f"{name}.nii.gz", chest_hu(number))
    write_rows(folder / "clm_ct_rate_train.arrow", [{}, {}, {}])
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "labels.nii.gz")
    pairs = [{"id": str(n), "ref": f"cardiomegaly is {n} present .", "hyp": "no emphysema ."} for n in range(3)]
    (folder / "run").mkdir()
    (folder / "run" / "generated.json").write_text(json.dumps(pairs), encoding="utf-8")
    words = [str(folder / "scans"), "--weights", str(folder / "weights/last.ckpt"), "--workers", "1"]
    assert embed.main([*words, "--out", str(folder / "table.parquet")]) == 0
    return folder


def command(kind: str, inputs: Path, out: Path) -> tuple[Main, list[str], Path]:
    """A command that writes to ``out`` (with the ending that it needs), its words, and what it writes."""
    weights, scan = ("--weights", inputs / "weights/last.ckpt"), inputs / "scans/chest.nii.gz"
    found = {
        "embed": (embed.main, [inputs / "scans", *weights, "--workers", "1", "--out"], ".parquet"),
        "explain": (explain.main, [scan, *weights, "--findings", "The heart is clear.", "--out"], ""),
        "gallery": (visualize_datasets.main, [inputs / "clm_ct_rate_train.arrow", "--out"], ""),
        "retrieve": (retrieve.main, [inputs / "table.parquet", "--id", "chest.nii.gz", "--out"], ".csv"),
        "zero_shot": (zero_shot.main, [inputs / "table.parquet", *weights, "--findings", "nodule", "--out"], ".json"),
        "segmentation": (score_segmentation.main, [*[inputs / "labels.nii.gz"] * 2, "--out"], ".csv"),
        "reports": (score_reports.main, [inputs / "run/generated.json", "--per-case"], ".csv"),
        "report_gallery": (report_gallery.main, [inputs / "run", "--no-pictures", "--out"], ".html"),
        "phantoms": (phantoms.main, [*"--train 1 --test 1 --ctrg 1 --size 32 --workers 1 --out".split()], ""),
        "verify": (verify.main, [inputs / "clm_ct_rate_train.arrow", "--json"], ".json"),
        "convert folder": (convert_meter_weights.main, [inputs / "weights/last.ckpt", "--to", "folder"], ""),
        "convert safetensors": (
            convert_meter_weights.main,
            [inputs / "weights/last.ckpt", "--to", "safetensors"],
            ".safetensors",
        ),
        "convert torch": (convert_meter_weights.main, [inputs / "weights/last.ckpt", "--to", "mg3d"], ".pt"),
    }
    main, words, ending = found[kind]
    place = out.with_name(out.name + ending)
    return main, [*map(str, words), str(place)], place


KINDS = ["embed", "explain", "gallery", "retrieve", "zero_shot", "segmentation", "reports", "report_gallery"]
KINDS += ["phantoms", "verify", "convert folder", "convert safetensors", "convert torch"]


def one_message(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    lines = text[text.rindex("error: ") :].splitlines()
    assert len(lines) <= 5 and "mend: " in lines[-1] and "Traceback" not in text, text
    return "\n".join(lines)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_another_process_writes_is_refused(
    kind: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words, out = command(kind, inputs, tmp_path / "out")
    with exclusive_output(out):
        assert main(words) == 2
    assert "is being written by host " in one_message(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_ends_in_one_message_and_nothing_under_the_final_name(
    kind: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words, out = command(kind, inputs, tmp_path / "out")
    with small_files(16):
        assert main(words) == 1
    told = one_message(capsys)
    assert "cannot write" in told and " free)" in told and not out.exists(), told
    left = [entry for entry in tmp_path.rglob("*") if entry.is_file()]
    assert left == [], left
    assert main(words) in (0, 1) and out.exists()  # embed says 1 where a scan fails; here all is well again


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_place_and_a_missing_parent_end_in_one_message_or_well(
    kind: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    main, words, _ = command(kind, inputs, tmp_path / "file" / "out")
    assert main(words) in (1, 2)
    one_message(capsys)
    main, words, out = command(kind, inputs, tmp_path / "new" / "parent" / "out")
    code = main(words)
    assert (code == 0 and out.exists()) or (code == 2 and one_message(capsys))


def test_a_disk_that_fills_while_a_gallery_is_drawn_is_no_fault_of_the_studies(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert visualize_datasets.main([str(inputs / "clm_ct_rate_train.arrow"), "--out", str(out), "--limit", "1"]) == 0
    before = sorted(path.name for path in out.rglob("*"))
    largest = max(path.stat().st_size for path in (out / "studies").rglob("*.png"))
    with small_files(largest - 1):
        assert visualize_datasets.main([str(inputs / "clm_ct_rate_train.arrow"), "--out", str(out)]) == 1
    assert "cannot write" in one_message(capsys)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_two_embeddings_of_one_table_write_every_row_once(inputs: Path, tmp_path: Path, repository: Path) -> None:
    for number in range(4):
        save_nifti(tmp_path / "scans" / f"{number}.nii.gz", chest_hu(number))
    words = ["tools/embed.py", str(tmp_path / "scans"), "--weights", str(inputs / "weights/last.ckpt")]
    line = [sys.executable, *words, "--workers", "1", "--out", str(tmp_path / "e.parquet")]
    pair = [subprocess.Popen(line, cwd=repository, stderr=subprocess.PIPE, encoding="utf-8") for _ in range(2)]
    told = [process.communicate()[1] for process in pair]
    codes = [process.returncode for process in pair]
    assert 0 in codes and set(codes) <= {0, 2} and "Traceback" not in "".join(told), told
    assert pq.read_table(tmp_path / "e.parquet").column("id").to_pylist() == [f"{n}.nii.gz" for n in range(4)]


def test_leftovers_of_a_killed_command_go_with_its_next_run(inputs: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    from mg3d.atomic import this_host

    main, words, out = command("gallery", inputs, tmp_path / "out")
    left = tmp_path / f".{out.name}.{this_host()}-{ended.pid}-0123abcd.tmp"
    left.mkdir()
    (left / "index.html").touch()
    assert main(words) == 0
    assert list(tmp_path.iterdir()) == [out]


def test_labels_and_scores_of_a_text_classifier_are_locked_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.csv"), "--out"]
    for name, out in (("label", tmp_path / "found.csv"), ("evaluate", tmp_path / "scores")):
        with exclusive_output(out):
            (tmp_path / "data.csv").write_text("AccessionNo,report_text\na,b\n")
            code = text_labels.main([name, *common, str(out)])
        told = one_message(capsys)
        assert code == 2 and ("is being written" in told or name == "evaluate"), told


def test_two_comparisons_in_one_folder_run_every_task_once(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = find_benchmarks(repository / "downstream")
    plan = make_plan(programs, ["ACDC"], ["scratch"], log_dir=tmp_path / "log", words=["no_such_word"])
    lock = plan[0].claim()
    try:
        assert run_plan(plan) == plan and not plan[0].log.exists()
        with pytest.raises(EnvironmentProblem, match="is being run by host"):
            plan[0].claim()
        assert run_all.main(["--benchmarks", "ACDC", "--log-dir", str(tmp_path / "log"), "--task", "0"]) == 2
        assert "is being run by" in one_message(capsys)
    finally:
        lock.release()


def _array(source: int) -> np.ndarray:
    return np.zeros(source)


def test_a_full_disk_is_no_fault_of_a_scan_that_is_prepared(tmp_path: Path) -> None:
    jobs = [Job("a", 10_000), Job("b", 10)]
    with small_files(2000), pytest.raises(OutputError) as caught:
        prepare_arrays(tmp_path / "prepared", {}, jobs, _array)
    assert caught.value.path.endswith("a.npy")
    assert prepare_arrays(tmp_path / "prepared", {}, jobs, _array) == {}
