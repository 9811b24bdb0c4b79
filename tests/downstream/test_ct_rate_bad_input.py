"""CT-RATE and the report classifier through their commands: what users get wrong is refused with file, key and mend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import load_folder

from mg3d.finetuning.experiment import run_benchmark
from mg3d.finetuning.text_labels.command import main as text_classifier
from mg3d.phantoms.downstream.ct_rate import write_ct_rate
from tests.tools.command import refusal

BENCHMARK = load_folder("CT-RATE").BENCHMARK
TABLES = "dataset/{}"
REPORTS = TABLES.format("radiology_text_reports/validation_reports.csv")
LABELS = TABLES.format("multi_abnormality_labels/train_predicted_labels.csv")
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ct_rate_bad") / "download"
    write_ct_rate(root, train=6, valid=3, size=32, seed=3)
    return root


@pytest.fixture
def root(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


def words(root: Path, place: Path, *more: str) -> list[str]:
    places = [f"data_root={root}", f"work_dir={place / 'work'}", f"log_dir={place / 'log'}"]
    quick = ["feature_size=12", "roi=[32,32,32]", "num_gpus=0", "num_workers=0", "width=16", "latent=16", "max_epoch=1"]
    given = {word.split("=")[0] for word in more}
    return ["with", *places, *(word for word in quick if word.split("=")[0] not in given), *more]


def refused(capsys: pytest.CaptureFixture[str], line: list[str]) -> str:
    return refusal(capsys, lambda given: run_benchmark(BENCHMARK, given), *line)


def table(path: str, change: Callable[[str], str], encoding: str = "utf-8") -> Damage:
    return lambda root: (root / path).write_bytes(change((root / path).read_text(encoding="utf-8")).encode(encoding))


def cells(change: Callable[[str], str]) -> Callable[[str], str]:
    """Change every line but the header."""
    return lambda text: "\n".join([(lines := text.splitlines())[0], *map(change, lines[1:])]) + "\n"


UNKNOWN = table(LABELS, cells(lambda line: line.split(",")[0] + 18 * ","))
WRONG_FILES: dict[str, tuple[Damage, str, str]] = {
    "another column": (table(REPORTS, lambda t: t.replace("Findings_EN", "Findings")), "'Findings_EN' is missing", ""),
    "colons": (
        table(REPORTS, lambda t: t.replace(",", ":")),
        "'VolumeName', 'Findings_EN', 'Impressions_EN' are missing",
        "",
    ),
    "no reports": (lambda root: (root / REPORTS).unlink(), "validation_reports.csv: table not found", ""),
    "another finding": (table(LABELS, lambda t: t.replace("Emphysema", "emphysema")), "'Emphysema' is missing", ""),
    "no label": (table(LABELS, cells(lambda line: line[:-1] + "x")), "row 2: label 'x' is not 0, 1 or empty", ""),
    "unknown labels": (UNKNOWN, "no training case has a label", "volumes have no labels: train_"),
    "no validation": (lambda root: shutil.rmtree(root / "dataset" / "valid"), "the test part", "no valid volume"),
    "no data": (lambda root: shutil.rmtree(root / "dataset"), "no dataset/train or dataset/valid folder here", ""),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_wrong_files_are_refused_by_the_run_and_listed_by_the_check(
    wrong: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said, listed = WRONG_FILES[wrong]
    damage(root)
    assert said in refused(capsys, words(root, tmp_path))
    capsys.readouterr()
    assert run_benchmark(BENCHMARK, ["--check-data", *words(root, tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (listed or said) in lines[0] and "mend: " in lines[0] and len(lines) <= 5


def test_a_cut_volume_is_named_by_the_run_and_by_the_full_check(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = sorted((root / "dataset" / "train").rglob("*.nii.gz"))[0]
    volume.write_bytes(volume.read_bytes()[:400])
    told = refused(capsys, words(root, tmp_path))
    assert volume.name in told and "truncated" in told
    assert run_benchmark(BENCHMARK, ["--check-data", *words(root, tmp_path, "full_check=True")]) == 2
    assert volume.name in capsys.readouterr().err.splitlines()[0]


def test_names_with_or_without_ending_and_latin_letters_are_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table(LABELS, lambda text: text.replace(".nii.gz", ""))(root)
    table(REPORTS, lambda text: text.replace(".nii.gz", "").replace(" is", " is é", 1))(root)
    assert run_benchmark(BENCHMARK, ["--check-data", *words(root, tmp_path)]) == 0
    assert "nothing wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("width=30", "write width=32"),
        ("latent=0", "at least 1"),
        ("max_tokens=0", "write max_tokens=3"),
        ("max_cases=-1", "at least 0"),
        ("templates=[present]", "names no pair of prompts"),
        ("trainable=[everything]", "choose from latents"),
        ("pools=[everything]", "is no pool"),
        ("image_tokens=two_sets", "encoder=swin_l, not swin_b"),
        ("text_encoder=./nothing", "./nothing does not exist"),
        ("text_weights=none.pt", "no file text_weights=none.pt"),
        ("weights=none.pt", "no weights at none.pt"),
        ("template=[a]", "write templates"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(
    key: str, said: str, download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, words(download, tmp_path, key))


def test_weights_of_another_kind_are_refused(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words_of_768 = {"text_transformer.embeddings.word_embeddings.weight": torch.zeros(9, 768)}
    torch.save({**words_of_768, "to_text_latent.weight": torch.zeros(2, 768)}, tmp_path / "ctclip.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    ct_clip, other = tmp_path / "ctclip.pt", tmp_path / "other.pt"
    assert "text_weights=" in refused(capsys, words(download, tmp_path, f"weights={ct_clip}", "feature_size=0"))
    told = refused(capsys, words(download, tmp_path, f"text_weights={ct_clip}"))
    assert "word_embeddings.weight (9, 768), not (" in told and "set text_encoder=" in told
    assert "no text encoder" in refused(capsys, words(download, tmp_path, f"text_weights={other}"))


HEADER = "AccessionNo,report_text"
BAD_TABLES = {
    "another column": (b"id,report_text\na,Clear.\n", "AccessionNo"),
    "latin-1": (f"{HEADER}\na,é\n".encode("latin-1"), "row 2: 1 bytes of the file are no UTF-8"),
    "colons": (f"{HEADER}\na,Clear.\n".replace(",", ":").encode(), "columns are missing"),
    "a name twice": (f"{HEADER}\na,Clear.\na,Other.\n".encode(), "AccessionNo 'a' is there twice"),
    "an unquoted text": (f"{HEADER}\na,Clear, no effusion.\n".encode(), "row 2 has 3 cells"),
    "no row": (f"{HEADER}\n".encode(), "holds no report"),
    "a workbook": (b"PK\x03\x04\xff\xfe", "workbook"),
}


@pytest.mark.parametrize("wrong", BAD_TABLES)
def test_tables_of_reports_that_cannot_be_read_are_refused(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = BAD_TABLES[wrong]
    (tmp_path / "reports.csv").write_bytes(content)
    line = ("label", "--model", tmp_path, "--data", tmp_path / "reports.csv", "--out", tmp_path / "out.csv")
    told = refusal(capsys, text_classifier, *line)
    assert said in told and "reports.csv" in told
