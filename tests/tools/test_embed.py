"""tools/embed.py: every input, resumable, honest about failures, the numbers those of the API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.collate import collate_reports
from mg3d.datasets.volume_report import VolumeReportDataset
from mg3d.inference.model import load_model
from tests.inference.tiny_weights import SPACING_ZYX, checkpoint, chest_hu, save_nifti
from tools.embed import main
from tools.embedding import job

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("scans", "datasets")]
from arrow_builders import write_corpus
from scan_files import axial_series


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    for number in range(5):
        save_nifti(folder / f"patient {number}" / "scan.nii.gz", chest_hu(number))
    return folder


def embed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any], str]:
    code = main([*map(str, words), "--workers", "1"])
    caught = capsys.readouterr()
    return code, json.loads(caught.out.splitlines()[-1]) if caught.out else {}, caught.err


def column(path: Path, name: str) -> np.ndarray:
    return np.array(pq.read_table(path).column(name).to_pylist(), dtype=np.float32)


def test_a_folder_becomes_a_table_of_the_apis_numbers(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scans / "notes.txt").write_text("no scan")
    (scans / ".hidden.nii.gz").write_text("no scan")
    axial_series(scans / "dicom series", np.ascontiguousarray(chest_hu(7).transpose(2, 1, 0)), SPACING_ZYX[::-1])
    out = tmp_path / "e.parquet"
    code, result, _ = embed(capsys, scans, "--weights", weights, "--out", out, "--batch-size", "2")
    assert code == 0 and result["embedded"] == result["rows"] == 6 and result["failed"] == 0
    assert result["scans_per_second"] > 0 and result["width"] == 12 and result["output"] == "embedding"
    table = pq.read_table(out)
    assert table.column("id").to_pylist() == ["dicom series", *(f"patient {k}/scan.nii.gz" for k in range(5))]
    model = load_model(weights)
    for number in range(5):
        wanted = model.vectors(model.processor(scans / f"patient {number}" / "scan.nii.gz"))[0]
        assert np.allclose(column(out, "embedding")[1 + number], wanted, atol=1e-6)
    facts = json.loads(table.schema.metadata[b"mg3d.embedding"])
    assert facts["weights"] == model.digest and facts["mode"] == "resize"
    assert facts["preparation"]["target_spacing_mm"] == [1.5, 0.75, 0.75]
    first = table.slice(1, 1).to_pylist()[0]
    assert json.loads(first["record"])["stored_shape_DHW"] == [40, 36, 38] and len(first["source_sha256"]) == 64


@pytest.mark.parametrize(("output", "shape"), [("pooled", (5, 48)), ("tokens", (5, 16, 48))])
def test_other_outputs_and_crops(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, shape: tuple[int, ...]
) -> None:
    out = tmp_path / "e.parquet"
    code, result, _ = embed(
        capsys, scans, "--weights", weights, "--out", out, "--output", output, "--mode", "crops", "--batch-size", "3"
    )
    assert code == 0 and result["volumes"] == 40
    found = column(out, output)
    assert found.shape == shape
    model = load_model(weights)
    scan = model.processor(scans / "patient 3" / "scan.nii.gz", mode="crops")
    assert np.allclose(found[3], model.vectors(scan, output)[0], atol=1e-5)  # type: ignore[arg-type]


def test_packed_rows_give_the_evaluations_vectors_of_volumes_and_reports(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "arrows", "clm_ct_rate", {"train": 2, "test": 4})
    write_corpus(tmp_path / "arrows", "clm_chest_ctrg", {"test": 3})
    out = tmp_path / "e.parquet"
    code, result, _ = embed(
        capsys, tmp_path / "arrows", "--weights", weights, "--out", out, "--split", "test", "--batch-size", "3"
    )
    assert code == 0 and result["rows"] == 7
    model, first = load_model(weights), 0
    for corpus, rows in (("clm_ct_rate", 4), ("clm_chest_ctrg", 3)):  # the first one is that of the weights
        dataset = VolumeReportDataset(
            ArrowTable([tmp_path / "arrows" / f"{corpus}_test.arrow"]),
            corpus=corpus,
            tokenizer=model.tokenizer,
            size_dhw=(64, 32, 32),
            max_text_len=24,
            first_row=first,
        )
        samples = [dataset[row] for row in range(rows)]
        image = torch.stack([sample.image for sample in samples])
        with torch.no_grad():
            wanted = model.network.encode_image(image)
            text = model.network.encode_report(collate_reports([sample.report for sample in samples]))
        part = slice(first, first + rows)
        assert np.allclose(column(out, "embedding")[part], wanted, atol=1e-6)
        assert np.allclose(column(out, "text_embedding")[part], text, atol=1e-6)
        first += rows
    row = pq.read_table(out).to_pylist()[1]
    assert row["id"] == "clm_ct_rate/test/scan_1" and row["patient_id"] == "patient_0" and row["labels"] == [1] * 18
    assert "nodule" in row["report"]


def test_a_killed_run_goes_on_and_ends_with_the_same_table(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [scans, "--weights", weights, "--batch-size", "1"]
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    assert embed(capsys, *words, "--out", whole)[0] == 0
    monkeypatch.setattr(job, "SCANS_PER_PART", 2)
    encode, calls = job._Run._encode, []

    def killed(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        encode(self, *arguments)

    monkeypatch.setattr(job._Run, "_encode", killed)
    code, _, errors = embed(capsys, *words, "--out", out)
    assert code == 130 and "go on" in errors and not out.exists()
    monkeypatch.setattr(job._Run, "_encode", encode)
    code, result, _ = embed(capsys, *words, "--out", out)
    assert code == 0 and result["already_there"] == 3 and result["embedded"] == 2
    assert pq.read_table(out).equals(pq.read_table(whole))
    assert not list(tmp_path.glob(".*"))


def test_a_part_that_was_being_written_when_the_run_was_killed_does_not_count(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.parquet"
    (tmp_path / ".e.parquet.parts").mkdir()
    (tmp_path / ".e.parquet.parts" / ".part-000000.parquet.tmp").write_bytes(b"PAR1 half")
    code, result, _ = embed(capsys, scans, "--weights", weights, "--out", out)
    assert code == 0 and result["already_there"] == 0 and result["rows"] == 5


def test_new_scans_are_added_and_failed_ones_tried_again(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = scans / "patient 1" / "scan.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:500])
    save_nifti(scans / "patient 2" / "slice.nii.gz", chest_hu()[:1])
    out = tmp_path / "e.parquet"
    words = [scans, "--weights", weights, "--out", out]
    code, result, _ = embed(capsys, *words)
    assert code == 1 and result["failed"] == 2 and result["rows"] == 4
    failures = json.loads((tmp_path / "e.failures.json").read_text(encoding="utf-8"))["failures"]
    assert [entry["name"] for entry in failures] == ["patient 1/scan.nii.gz", "patient 2/slice.nii.gz"]
    assert "too thin" in failures[1]["message"] and failures[1]["remedy"]
    broken.write_bytes(whole)
    (scans / "patient 2" / "slice.nii.gz").unlink()
    save_nifti(scans / "patient 9" / "scan.nii.gz", chest_hu(9))
    code, result, _ = embed(capsys, *words)
    assert code == 0 and result["already_there"] == 4 and result["embedded"] == 2 and result["rows"] == 6
    assert json.loads((tmp_path / "e.failures.json").read_text(encoding="utf-8"))["failures"] == []
    code, result, _ = embed(capsys, *words)
    assert code == 0 and result["embedded"] == 0 and result["rows"] == 6


def test_a_table_of_other_weights_or_settings_is_not_mixed(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.parquet"
    words = [scans, "--out", out]
    assert embed(capsys, *words, "--weights", weights)[0] == 0
    before = out.read_bytes()
    code, _, errors = embed(capsys, *words, "--weights", weights, "--mode", "crops")
    assert code == 2 and "made with other mode" in errors and "--overwrite" in errors
    state = torch.load(weights, weights_only=True)
    state["state_dict"]["image_text_itc_head.image_norm.mean"] += 1
    torch.save(state, tmp_path / "other.ckpt")
    code, _, errors = embed(capsys, *words, "--weights", tmp_path / "other.ckpt")
    assert code == 2 and "made with other weights" in errors and out.read_bytes() == before
    assert embed(capsys, *words, "--weights", tmp_path / "other.ckpt", "--overwrite")[1]["embedded"] == 5
    out.write_bytes(b"no parquet")
    code, _, errors = embed(capsys, *words, "--weights", weights)
    assert code == 2 and "cannot be read" in errors


def test_a_scan_of_the_same_name_elsewhere_is_not_taken_for_the_one_in_the_table(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--weights", weights, "--out", tmp_path / "e.parquet"]
    assert embed(capsys, scans, *words)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert embed(capsys, "scans", *words)[1]["already_there"] == 5
    scans.rename(tmp_path / "others")
    code, _, errors = embed(capsys, tmp_path / "others", *words)
    assert code == 2 and "holds another patient 0/scan.nii.gz" in errors


def test_weights_without_a_shared_space_give_pooled_features(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = checkpoint(tmp_path / "plain", shared=False)
    code, result, _ = embed(capsys, scans, "--weights", plain, "--out", tmp_path / "e.parquet")
    assert code == 0 and result["output"] == "pooled" and result["width"] == 48
    code, _, errors = embed(capsys, scans, "--weights", plain, "--out", tmp_path / "f.parquet", "--output", "embedding")
    assert code == 2 and "no trained space" in errors and not (tmp_path / "f.parquet").exists()


def test_a_single_bad_scan_is_bad_input(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, hu, spacing, why in (
        ("slice.nii.gz", chest_hu()[:1], SPACING_ZYX, "too thin"),
        ("spacing.nii.gz", chest_hu(), (900.0, 8.0, 8.0), "is not that of a CT"),
    ):
        code, _, errors = embed(
            capsys, save_nifti(tmp_path / name, hu, spacing), "--weights", weights, "--out", tmp_path / "e.parquet"
        )
        assert code == 2 and why in errors and "mend" in errors and "Traceback" not in errors
        assert errors.count(name) == 1 and not (tmp_path / "e.parquet").exists()


def test_two_processes_give_the_same_table(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert embed(capsys, scans, "--weights", weights, "--out", one)[0] == 0
    assert main([str(scans), "--weights", str(weights), "--out", str(two), "--workers", "2"]) == 0
    assert pq.read_table(one).equals(pq.read_table(two))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["absent", "--weights", "w", "--out", "e.parquet"], "no such file or folder"),
        (["scans", "--weights", "absent", "--out", "e.parquet"], "no weights at absent"),
        (["scans", "--weights", "swin_b", "--out", "e.parquet"], "is an architecture"),
        (["scans", "--weights", "w", "--out", "e.csv"], "parquet"),
        (["scans", "--weights", "w", "--out", "no/e.parquet"], "no such folder"),
        (["empty", "--weights", "w", "--out", "e.parquet"], "no scan in this folder"),
        (["scans"], "required"),
        (["scans", "--weights", "w", "--out", "e.parquet", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_refusals_are_short_and_load_no_torch(repository: Path, tmp_path: Path, words: list[str], why: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "w").write_bytes(b"")
    save_nifti(tmp_path / "scans" / "a.nii.gz", chest_hu())
    program = (
        f"import sys; sys.argv = ['embed.py', *{words!r}]; sys.path.insert(0, {str(repository)!r})\n"
        "from tools.embed import main\n"
        "try:\n    code = main()\nexcept SystemExit as done:\n    code = done.code\n"
        "assert 'torch' not in sys.modules, 'torch'\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert why in done.stderr and len(done.stderr.splitlines()) <= 5
