"""``tools/score_reports.py``: numbers, protocol, clinical labels, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.command import answer, modules_after, refusal
from tools.score_reports import main

PAIRS = [
    {
        "id": "valid_1_a",
        "ref": "Heart size is normal. Pleural effusion is present.",
        "hyp": "Pleural effusion is seen.",
    },
    {
        "id": "valid_1_b",
        "ref": ["No nodule is seen.", "There is no nodule."],
        "hyp": "There is a nodule.\nCardiomegaly.",
    },
    {"id": "valid_2_a", "ref": "Emphysema is present in both lungs.", "hyp": ""},
]
SHORT = ("--meteor", "none", "--rounds", "50")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS), encoding="utf-8")
    return path


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_recorded_numbers_through_the_command(
    tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((reference_dir / "expected" / "caption_metrics.json").read_text(encoding="utf-8"))
    path = write(tmp_path / "pairs.json", content["pairs"])
    told = answer(capsys, main, path, "--json", "--pretokenised", "--meteor", "none", "--rounds", 0)
    assert told["printed"] == "" and told["cases"] == 100
    wanted = content["pycocoevalcap"]
    for name, coco in {"bleu_4": "Bleu_4", "rouge_l": "ROUGE_L", "cider": "CIDEr"}.items():
        assert told["metrics"][name]["mean"] == pytest.approx(wanted[coco], abs=1e-6)
        assert told["metrics"][name]["ci95"] is None
    assert told["metrics"]["meteor_java"] == {"mean": None, "ci95": None, "n": 100}
    assert "closest" in told["protocol"]["bleu"] and "as given" in told["protocol"]["text"]


def test_the_table_carries_protocol_notes_and_cases(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, main, pairs, *SHORT, "--per-case", tmp_path / "cases.csv")
    assert "meteor_java" in told["printed"] and "not computed" in told["printed"]
    assert "CIDEr-D" in told["printed"] and "note: 1 of 3 generations are empty" in told["printed"]
    low, high = told["metrics"]["bleu_1"]["ci95"]
    assert low <= told["metrics"]["bleu_1"]["mean"] <= high
    with (tmp_path / "cases.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == [pair["id"] for pair in PAIRS]
    assert float(rows[2]["rouge_l"]) == 0.0 < float(rows[0]["rouge_l"])
    lines = write(tmp_path / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in PAIRS))
    assert answer(capsys, main, lines, *SHORT)["metrics"] == told["metrics"]


def test_keyword_labels_give_clinical_scores(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, main, pairs, *SHORT, "--labeller", "keywords")
    # wanted: effusion, nothing, emphysema; found: effusion, nodule and cardiomegaly, nothing
    assert told["metrics"]["ce_precision_micro"]["mean"] == pytest.approx(1 / 3)
    assert told["metrics"]["ce_recall_micro"]["mean"] == pytest.approx(1 / 2)
    assert told["metrics"]["crg"]["floor"] == pytest.approx(1 / 3)
    assert "floor 0.3333" in told["printed"] and told["protocol"]["labeller"].startswith("keywords")
    by_patient = answer(capsys, main, pairs, *SHORT, "--labeller", "keywords", "--patient-pattern", r"valid_(\d+)_")
    assert "patients" in by_patient["protocol"]["ci95"]


def test_label_tables_are_matched_by_name(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write(tmp_path / "truth.csv", "id,Edema,Fracture\na,1,0\nb,,1\nc,-1,1\n")
    found = write(tmp_path / "found.csv", "id,Fracture,Edema\nc,1,2\nb,0,\na,3,1\n")
    told = answer(capsys, main, pairs, *SHORT, "--labels", truth, found)
    assert told["metrics"]["ce_precision_micro"]["mean"] == 1.0
    assert told["metrics"]["ce_recall_micro"]["mean"] == pytest.approx(2 / 3)
    assert any("not the 3 scored texts" in note for note in told["notes"])


COLUMNS = [f"Finding {number}" for number in range(14)]


def test_two_labellers_with_14_columns_in_other_orders_agree(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Present 1, absent 0, uncertain -1 and nothing at all, as the published labellers write them."""
    codes = [["1", "0", "-1", ""][(row + column) % 4] for row in range(4) for column in range(14)]
    rows = [dict(zip(COLUMNS, codes[14 * row : 14 * row + 14], strict=True)) for row in range(4)]
    tables = []
    for name, order in {"first": COLUMNS, "second": COLUMNS[::-1]}.items():
        lines = [",".join([f"report {number}", *(row[column] for column in order)]) for number, row in enumerate(rows)]
        tables.append(write(tmp_path / f"{name}.csv", "\n".join([",".join(["Reports", *order]), *lines]) + "\n"))
    told = answer(capsys, main, pairs, *SHORT, "--labels", *tables)
    assert told["metrics"]["ce_f1_micro"]["mean"] == 1.0


@pytest.mark.realdata
def test_the_samples_of_two_published_labellers(
    pairs: Path, shared_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They order their 14 columns differently and agree but for one case."""
    folder = shared_dir / "data" / "expected"
    tables = (folder / "chexbert_sample_labels.csv", folder / "chexpert_sample_labels.csv")
    told = answer(capsys, main, pairs, *SHORT, "--labels", *tables)
    assert told["metrics"]["ce_f1_micro"]["mean"] > 0.6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable"),
        ([], "no list of pairs"),
        ({"id": "a"}, "no list of pairs"),
        ([{"id": "a", "text": "b", "hyp": "c"}], "entry 0 has no ref (nor reference, ground_truth), but id, text, hyp"),
        ([{"ref": "b", "hyp": "c"}], "entry 0 has no id"),
        ([{"id": 7, "ref": "b", "hyp": "c"}, {"id": None, "ref": "b", "hyp": "c"}], "entry 1 has an empty id"),
        ([{"id": " ", "ref": "b", "hyp": "c"}], "entry 0 has an empty id"),
        (["a"], "entry 0 is no object"),
        ([{"id": "a", "ref": "b", "hyp": None}], "must be texts"),
        ([{"id": "a", "ref": [], "hyp": "c"}], "must be texts"),
        ([{"id": "a", "ref": "b", "hyp": "c"}] * 2, "there twice"),
        ([{"id": "a", "ref": " \n", "hyp": "c"}], "empty reference: a"),
    ],
)
def test_bad_pairs_are_refused(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, main, write(tmp_path / "pairs.json", content), *SHORT)


@pytest.mark.parametrize(
    ("hypotheses", "bleu_1", "note"),
    [
        (["The heart is large."], 1.0, "CIDEr of one document is 0 by construction"),
        (["The heart\n\nis\r\nlarge.", "No effusion."], 1.0, ""),
        (["", " \n"], 0.0, "2 of 2 generations are empty"),
    ],
)
def test_one_document_line_breaks_and_silence_have_stated_values(
    hypotheses: list[str], bleu_1: float, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = ["The heart is large.", "No effusion."]
    pairs = [{"id": str(n), "ref": references[n], "hyp": text} for n, text in enumerate(hypotheses)]
    told = answer(capsys, main, write(tmp_path / "pairs.json", pairs), *SHORT, "--labeller", "keywords")
    assert told["metrics"]["bleu_1"]["mean"] == pytest.approx(bleu_1, abs=1e-6)
    assert told["metrics"]["cider"]["mean"] == pytest.approx(
        0.0 if note else told["metrics"]["cider"]["mean"], abs=1e-9
    )
    assert any(note in each for each in told["notes"])


def test_bad_words_are_refused(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refusal(capsys, main, tmp_path / "absent.json")
    assert "no such folder" in refusal(capsys, main, pairs, "--labeller", tmp_path / "absent", *SHORT)
    assert "pattern" in refusal(capsys, main, pairs, "--patient-pattern", "valid", *SHORT)
    assert "does not fit 3 ids" in refusal(capsys, main, pairs, "--patient-pattern", "(train)", *SHORT)
    good = write(tmp_path / "good.csv", "id,A\na,1\n")
    for text, message in (
        ("id,B\na,1\n", "findings"),
        ("id,A\nb,1\n", "ids"),
        ("id,A\na,7\n", "'7'"),
        ("id\n", "table"),
        ("id,A\n,1\n", "twice or empty"),
    ):
        table = write(tmp_path / "other.csv", text)
        assert message in refusal(capsys, main, pairs, "--labels", good, table, *SHORT)


def test_radeval_absent_is_said_before_anything_is_scored(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    single = pairs.with_name("single.json")
    write(single, [pair for pair in PAIRS if isinstance(pair["ref"], str)])
    monkeypatch.setitem(sys.modules, "radeval", None)
    assert "pip install" in refusal(capsys, main, single, "--radeval", "f1radbert_ct", *SHORT)
    assert "one reference" in refusal(capsys, main, pairs, "--radeval", "f1radbert_ct", *SHORT)


def test_help_and_scores_import_no_torch(pairs: Path, repository: Path) -> None:
    assert modules_after(repository, "tools.score_reports", "--help") == (0, set())
    assert modules_after(repository, "tools.score_reports", pairs, "--labeller", "keywords", *SHORT) == (0, set())


def test_it_runs_from_any_folder(pairs: Path, repository: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(repository / "tools" / "score_reports.py"), pairs.name, "--json", *SHORT]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout)["cases"] == 3
