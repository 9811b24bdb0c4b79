"""CTRG through its command: what users get wrong is refused in two lines that name file, entry or key and the mend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import load_folder

from mg3d.finetuning.experiment import run_benchmark
from mg3d.phantoms.downstream.ctrg import write_ctrg
from tests.tools.command import refusal

BENCHMARK = load_folder("CTRG").BENCHMARK
TABLE = "CTRG_finding_labels.csv"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ctrg_bad") / "download"
    write_ctrg(root, studies=12, size=32, seed=1)
    return root


@pytest.fixture
def root(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


def words(root: Path, *more: str) -> list[str]:
    places = [f"data_root={root}", f"work_dir={root.parent / 'work'}", f"log_dir={root.parent / 'log'}"]
    quick = ["feature_size=12", "roi=[32,32,32]", "num_gpus=0", "num_workers=0", "width=16", "stages=train,evaluate"]
    return ["with", *places, *quick, "max_epoch=1", "cache=memory", "freeze=encoder", *more]


def refused(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    return refusal(capsys, lambda given: run_benchmark(BENCHMARK, given), *line)


def annotation(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        path = root / "annotation.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return damage


def renamed(old: str, new: str) -> Damage:
    def change(content: dict[str, Any]) -> None:
        for row in (row for rows in content.values() for row in rows):
            row[new] = row.pop(old)

    return annotation(change)


def table(change: Callable[[str], str], encoding: str = "utf-8") -> Damage:
    def damage(root: Path) -> None:
        text = (root / TABLE).read_text(encoding="utf-8")
        (root / TABLE).write_bytes(change(text).encode(encoding))

    return damage


WRONG_FILES: dict[str, tuple[Damage, str]] = {
    "another key of the text": (renamed("report", "findings"), r"train[0]: no 'report', but "),
    "another key of the image": (renamed("image_path", "image"), r"train[0]: no 'image_path'"),
    "no id": (renamed("id", "case"), r"train[0]: no 'id'"),
    "a list is missing": (annotation(lambda content: content.pop("val")), "no list val (found: keys train, test)"),
    "one list of all": (
        lambda root: (root / "annotation.json").write_text("[]", encoding="utf-8"),
        "no list train, val, test (found: a list)",
    ),
    "an entry is a text": (annotation(lambda content: content["test"].insert(1, "7")), "test[1]: is a str"),
    "no report": (annotation(lambda content: content["train"][2].update(report=None)), "id '3' is a NoneType"),
    "no file": (annotation(lambda content: content["train"][2].update(image_path=7)), "image_path of id '3'"),
    "two reports of an id": (
        annotation(lambda content: content["train"].append({**content["train"][0], "report": "Another."})),
        "id '1' stands for another report",
    ),
    "cut short": (lambda root: (root / "annotation.json").write_text('{"train": [', encoding="utf-8"), "no JSON"),
    "latin-1": (
        lambda root: (root / "annotation.json").write_bytes('{"train": "é"}'.encode("latin-1")),
        "not UTF-8 (byte 0xe9 at position 11)",
    ),
    "a table in latin-1": (table(lambda text: f"{text}99,é\n", "latin-1"), f"{TABLE}: not UTF-8 (byte 0xe9)"),
    "another id column": (table(lambda text: text.replace("id,", "image,", 1)), "column id is missing (found: image"),
    "semicolons": (table(lambda text: text.replace(",", ";")), "column id is missing (found: id;"),
    "a word for a code": (table(lambda text: text.replace(",1", ",yes", 1)), "is 'yes', no code"),
    "a short line": (table(lambda text: f"{text}99,1\n"), "line 14 has another number of cells"),
    "other codes for an id": (table(lambda text: f"{text}1{',3' * 14}\n"), "line 14: id '1' has other codes"),
    "no line": (table(lambda text: text.split("\n")[0]), "and rows"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_wrong_files_are_refused_by_the_run_and_listed_by_the_check(
    wrong: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = WRONG_FILES[wrong]
    damage(root)
    assert said in refused(capsys, *words(root))
    capsys.readouterr()
    assert run_benchmark(BENCHMARK, ["--check-data", *words(root)]) == 2
    listed, *end = capsys.readouterr().err.splitlines()
    assert said in listed and "mend: " in listed and end[0].startswith("error: 1 problems in ") and len(end) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "case 3: no such file or folder"),
        (lambda folder: [each.unlink() for each in folder.iterdir()], "case 3: no jpg or png slice"),
        (lambda folder: (folder / "1.jpg").write_text("no picture", encoding="utf-8"), "1.jpg: slice is no picture"),
    ],
)
def test_scans_that_are_missing_empty_or_damaged_are_named(
    damage: Damage, said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(root / "Chest_New" / "3")
    told = refused(capsys, *words(root))
    assert said in told and told.count("Chest_New/3") <= 2
    assert run_benchmark(BENCHMARK, ["--check-data", *words(root, "full_check=True")]) == 2
    assert "Chest_New/3" in capsys.readouterr().err.splitlines()[0]


def test_a_byte_order_mark_and_ids_with_or_without_ending_are_read(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation(lambda content: [row.update(id=f"{row['id']}.nii.gz") for row in content["train"]] and None)(root)
    for name in ("annotation.json", TABLE):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes())
    assert run_benchmark(BENCHMARK, ["--check-data", *words(root)]) == 0
    assert "nothing wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("min_count=0", "at least 1"),
        ("min_count=999", "leaves no word"),
        ("max_tokens=2", "write max_tokens=3"),
        ("beams=0", "write beams=1"),
        ("width=10", "write width=16"),
        ("min_words=200", "max_tokens=150"),
        ("label_loss=-1.0", "at least 0"),
        ("patch_dropout=2.0", "0 to 1"),
        ("meteor=jar", "auto, java, nltk, none"),
        ("annotation=mine.json", "no mine.json"),
        ("labels=mine.csv", "label_loss=0"),
        ("weights=none.pt", "no weights at none.pt"),
        ("beam=3", "write beams"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(
    key: str, said: str, download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [word for word in words(download) if not key.startswith(word.split("=")[0] + "=")]
    line = [
        word.replace(str(download.parent), str(tmp_path)) if word.startswith(("work", "log")) else word for word in line
    ]
    assert said in refused(capsys, *line, key)


def test_weights_of_another_kind_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"text_transformer.embeddings.word_embeddings.weight": torch.zeros(9, 4)}
    torch.save({**text, "to_text_latent.weight": torch.zeros(2, 4)}, root / "ctclip.pt")
    torch.save({"a": torch.zeros(1)}, root / "other.pt")
    line = [word for word in words(root) if not word.startswith("feature_size")]
    assert "text_weights=" in refused(capsys, *line, f"weights={root / 'ctclip.pt'}")
    assert "no supported family" in refused(capsys, *line, f"weights={root / 'other.pt'}", "feature_size=12")


def test_a_part_without_a_case_is_refused_before_anything_is_trained(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation(lambda content: content.update(test=[], val=[]))(root)
    told = refused(capsys, *words(root))
    assert "the test part of the split has no case" in told
    assert run_benchmark(BENCHMARK, ["--check-data", *words(root)]) == 2
    assert "1 parts of the split have no case: test" in capsys.readouterr().err
