"""``tools/zero_shot.py``: pairs and competing prompts, folders with bad scans, tables, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mg3d.inference.model import load_model
from tests.inference.tiny_weights import checkpoint, chest_hu, save_nifti
from tests.tools.command import answer, modules_after, refusal
from tools import embed
from tools.zero_shot import main

FINDINGS = ("Pleural effusion", "Cardiomegaly")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans and a file that is none."""
    found = tmp_path_factory.mktemp("scans")
    for number in range(2):
        save_nifti(found / f"scan_{number}.nii.gz", chest_hu(4 * number))
    (found / "broken.nii.gz").write_bytes(b"no scan")
    return found


def test_each_finding_is_judged_against_its_negation(
    weights: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = folder / "scan_0.nii.gz"
    told = answer(capsys, main, scan, "--weights", weights, "--findings", *FINDINGS)
    model = load_model(weights)
    present, absent = (
        ["pleural effusion is present.", "cardiomegaly is present."],
        ["No pleural effusion.", "No cardiomegaly."],
    )
    wanted = model.zero_shot(model.processor(scan), present, absent)
    assert [row["finding"] for row in told["results"]] == list(FINDINGS)
    for row, value, chance in zip(told["results"], wanted.scores[0], wanted.probabilities[0], strict=True):
        assert row["score"] == pytest.approx(float(value), abs=1e-5)
        assert row["probability"] == pytest.approx(float(chance), abs=1e-5)
    assert (told["kind"], told["scans"], told["failed"]) == ("pairs", 1, 0)
    assert "Pleural effusion" in told["printed"] and "probability" in told["printed"]


def test_prompts_compete_for_one_probability(weights: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompts", "Lungs clear.", "No effusion.", "Cardiomegaly is present.")
    told = answer(capsys, main, folder / "scan_1.nii.gz", "--weights", weights, *words)
    assert sum(row["probability"] for row in told["results"]) == pytest.approx(1, abs=1e-5)
    best = max(told["results"], key=lambda row: row["score"])
    assert told["printed"].splitlines()[1].startswith(best["prompt"])


def test_a_folder_is_scored_but_for_the_scan_that_is_none(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "findings.txt"
    listed.write_text("# what to look for\nPleural effusion\n\nThe heart is clear.\tCardiomegaly is present.\n")
    out = tmp_path / "scores.csv"
    words = (folder, "--weights", weights, "--findings-file", listed, "--out", out)
    told = answer(capsys, main, *words, code=1)
    assert (told["scans"], told["failed"]) == (2, 1) and "left out broken.nii.gz" in told["told"]
    with out.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [row["scan"] for row in found] == ["scan_0.nii.gz"] * 2 + ["scan_1.nii.gz"] * 2
    assert [row["finding"] for row in found[:2]] == ["Pleural effusion", "The heart is clear."]
    alone = answer(capsys, main, folder / "scan_1.nii.gz", "--weights", weights, "--findings-file", listed)
    assert [row["score"] for row in alone["results"]] == [float(row["score"]) for row in found[2:]]


def test_a_table_of_embeddings_gives_the_scores_of_its_scans(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, table = folder / "scan_0.nii.gz", tmp_path / "table.parquet"
    assert embed.main([str(word) for word in (scan, "--weights", weights, "--out", table, "--workers", 1)]) == 0
    words = ("--weights", weights, "--findings", *FINDINGS)
    direct, stored = answer(capsys, main, scan, *words), answer(capsys, main, table, *words)
    for a, b in zip(direct["results"], stored["results"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
    out = tmp_path / "scores.json"
    answer(capsys, main, table, *words, "--out", out)
    assert json.loads(out.read_text(encoding="utf-8")) == stored["results"]


def test_weights_without_a_shared_space_give_no_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = checkpoint(tmp_path, shared=False)
    told = refusal(capsys, main, folder / "scan_0.nii.gz", "--weights", plain, "--findings", *FINDINGS)
    assert "no trained space that images and texts share" in told


def test_bad_questions_are_refused(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = (folder / "scan_0.nii.gz", "--weights", weights)
    assert "nothing to compete with" in refusal(capsys, main, *rest, "--prompts", "one")
    assert "is there twice" in refusal(capsys, main, *rest, "--findings", "Nodule", "Nodule ")
    assert "no place for the finding" in refusal(capsys, main, *rest, "--findings", "X", "--positive", "is present")
    assert "no place for the finding" in refusal(capsys, main, *rest, "--findings", "X", "--negative", "{finding} {0}")
    assert "no finding is given" in refusal(capsys, main, *rest, "--findings", " ")
    assert "prompt is empty" in refusal(capsys, main, *rest, "--prompts", "one", " ")
    assert "no such file" in refusal(capsys, main, *rest, "--findings-file", tmp_path / "none.txt")
    assert "not allowed with" in refusal(capsys, main, *rest, "--findings", "X", "--prompts", "Y", "Z")
    assert "no such folder" in refusal(capsys, main, *rest, "--findings", "X", "--out", tmp_path / "a" / "b.csv")
    broken = (folder / "broken.nii.gz", "--weights", weights, "--findings", "X")
    assert "broken.nii.gz" in refusal(capsys, main, *broken)


def test_help_and_refusals_need_no_torch(repository: Path, tmp_path: Path) -> None:
    assert modules_after(repository, "tools.zero_shot", "--help") == (0, set())
    words = (tmp_path, "--weights", "nowhere.ckpt", "--findings", "X")
    assert modules_after(repository, "tools.zero_shot", *words) == (2, set())
