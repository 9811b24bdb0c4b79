"""The gallery command: complete pages, true directions and lengths, safe text, bad rows shown, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_builders import (
    FINDINGS,
    IMPRESSION,
    SHAPE_DHW,
    Page,
    chest,
    ct_rate_tree,
    ctrg_tree,
    damage,
    marked,
    noise,
    save_nifti,
    write_csv,
    write_rows,
)
from PIL import Image

from tools.gallery.items import Ticket, choose
from tools.visualize_datasets import main

Capture = pytest.CaptureFixture[str]
TRICKY = 'Nodule <script>alert("1")</script> & "quoted" </script> of 3 < 4 mm.'


def draw(capsys: Capture, path: Path, out: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """Run the command, check its exit code, return its last line."""
    assert main([str(path), "--out", str(out), *words]) == code
    told = capsys.readouterr()
    assert FINDINGS not in told.out + told.err
    return json.loads(told.out.splitlines()[-1])


def page_of(out: Path, image_id: str) -> Page:
    return Page(next((out / "studies").glob(f"*-{image_id}.html")))


def picture(out: Path, image_id: str, name: str) -> np.ndarray:
    return np.asarray(Image.open(next((out / "studies").glob(f"*-{image_id}")) / f"{name}.png"))


def frames(out: Path, image_id: str, plane: str, window: str = "full") -> np.ndarray:
    """The frames of a strip [frame, row, column]."""
    pane = next(item for item in page_of(out, image_id).attributes if item.get("data-plane") == plane)
    strip = picture(out, image_id, f"{plane}-{window}")
    count = len(json.loads(pane["data-positions"]))
    return strip.reshape(count, strip.shape[0] // count, strip.shape[1])


@pytest.fixture(scope="module")
def arrows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrows")
    train = [
        {"image": marked(), "image_id": "marked"},
        {"findings": TRICKY, "image_id": 'a<b>"&/../..', "patient_id": "odd"},
        {"findings": "", "impression": "", "image_id": "mute"},
        {"image": noise(7), "image_id": "twin"},
    ]
    write_rows(folder / "clm_ct_rate_train.arrow", train)
    write_rows(folder / "clm_ct_rate_test.arrow", [{"image": noise(7), "patient_id": "train_3"}, {}])
    write_rows(folder / "clm_chest_ctrg_train.arrow", [{}, {}], grey=True)
    return folder


@pytest.fixture(scope="module")
def gallery(arrows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gallery") / "out"
    assert main([str(arrows), "--out", str(out)]) == 0
    return out


def test_every_page_parses_and_every_linked_file_exists(gallery: Path) -> None:
    pages = [gallery / "index.html", *sorted((gallery / "studies").glob("*.html"))]
    assert len(pages) == 9
    for path in pages:
        for link in Page(path).links:
            assert "//" not in link, "the pages must work without a network"
            assert link.startswith("#") or (path.parent / link).resolve().is_file(), f"{path.name}: {link}"


def test_summary_counts_what_lies_in_the_folder(arrows: Path, tmp_path: Path, capsys: Capture) -> None:
    summary = draw(capsys, arrows, tmp_path / "out", "--limit", "4")
    assert {key: summary[key] for key in ("studies", "drawn", "bad", "pages")} == {
        "studies": 8,
        "drawn": 4,
        "bad": 0,
        "pages": 5,
    }
    assert len(list((tmp_path / "out" / "studies").glob("*.html"))) == 4
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert abs(size - summary["bytes"]) < 200


def test_text_is_escaped_everywhere(gallery: Path) -> None:
    index = Page(gallery / "index.html")
    study = next(path for path in (gallery / "studies").glob("*.html") if "alert(" in path.read_text(encoding="utf-8"))
    assert study.resolve().is_relative_to(gallery.resolve())
    page = Page(study)
    assert page.names.count("script") == 1
    assert index.names.count("script") == 2
    assert 'alert("1")' in page.all_text
    assert 'a<b>"&/../..' in page.all_text


def test_filter_data_is_json_with_one_entry_per_card(gallery: Path) -> None:
    index = Page(gallery / "index.html")
    entries = json.loads(index.text["studies-data"])
    cards = [item for item in index.attributes if item["tag"] == "li" and item.get("class", "").startswith("study")]
    assert len(entries) == len(cards) == 8
    tricky = next(entry for entry in entries if entry["id"].startswith("a<b>"))
    assert TRICKY.lower() in tricky["text"]
    assert tricky["labels"]["Cardiomegaly"] == 1
    assert {entry["split"] for entry in entries} == {"train", "test"}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_the_superior_anterior_right_corner_is_top_left_of_the_outermost_frame(gallery: Path, plane: str) -> None:
    shown = frames(gallery, "marked", plane)
    outermost, opposite = (shown[-1], shown[0]) if plane == "axial" else (shown[0], shown[-1])
    rows, columns = outermost.shape
    assert outermost[: rows // 6, : columns // 8].min() > 200
    assert outermost[rows // 2 :].max() < 60
    assert outermost[:, columns // 2 :].max() < 60
    assert opposite.max() < 60


def test_letters_say_what_the_pictures_show(gallery: Path) -> None:
    words = page_of(gallery, "marked").path.read_text(encoding="utf-8")
    letters = re.findall(r'class="letter (\w+)">(\w)<', words)
    sides = [dict(letters[start : start + 4]) for start in (0, 4, 8)]
    assert sides[0] == {"top": "A", "right": "L", "bottom": "P", "left": "R"}
    assert sides[1] == {"top": "S", "right": "L", "bottom": "I", "left": "R"}
    assert sides[2] == {"top": "S", "right": "P", "bottom": "I", "left": "A"}


def test_pictures_have_the_proportions_of_the_body(gallery: Path) -> None:
    depth, height, width = (size * step for size, step in zip(SHAPE_DHW, (3.0, 2.0, 1.5), strict=True))
    for plane, expected in (("axial", width / height), ("coronal", width / depth), ("sagittal", height / depth)):
        _, rows, columns = frames(gallery, "marked", plane).shape
        assert columns / rows == pytest.approx(expected, rel=0.02)


def test_scale_bar_is_as_long_as_it_says(tmp_path: Path, capsys: Capture) -> None:
    empty = np.full((10, 10, 10), -1000, np.int16)
    source = write_rows(tmp_path / "x_train.arrow", [{"image": empty, "spacing_mm": (10.0, 10.0, 10.0)}])
    draw(capsys, source, tmp_path / "out")
    overview = picture(tmp_path / "out", "train_0_a_1", "overview")
    assert overview.shape == (400, 3 * 400 + 2 * 8)
    bar = overview[400 - 12 + 1, :400] == 255
    runs = [len(run) for run in "".join("#" if value else " " for value in bar).split()]
    assert runs == [80], "20 mm at 100 mm / 400 pixels"
    rulers = [item for item in page_of(tmp_path / "out", "train_0_a_1").attributes if item.get("class") == "ruler"]
    assert [item["style"] for item in rulers] == ["width: 20.0%"] * 3


def test_windows_are_drawn_and_the_wanted_one_shows_first(arrows: Path, tmp_path: Path, capsys: Capture) -> None:
    draw(capsys, arrows / "clm_ct_rate_train.arrow", tmp_path / "out", "--ids", "marked", "--window", "100", "50")
    shown = {key: frames(tmp_path / "out", "marked", "axial", key) for key in ("own", "lung", "mediastinum", "full")}
    assert shown["own"][0].max() == 0, "air lies below 75 HU"
    assert round(float(shown["lung"][0].mean())) == 60, "(-1000 + 1350) / 1500 of 255"
    viewer = next(item for item in page_of(tmp_path / "out", "marked").attributes if item.get("class") == "viewer")
    assert viewer["data-window"] == "own"


def test_the_full_window_is_that_of_the_file(tmp_path: Path, capsys: Capture) -> None:
    volume = np.where(marked() > 0, 240, -160).astype(np.int16)
    rows = [{"image": volume, "image_id": "narrow"}]
    source = write_rows(tmp_path / "clm_ct_rate_train.arrow", rows, window="[-160,240]")
    source.with_suffix(".manifest.json").write_text(
        json.dumps({"corpus": "clm_ct_rate", "config": {"window_hu": "[-160,240]", "geometry": {"size": [9, 8, 7]}}})
    )
    draw(capsys, source, tmp_path / "out", "--window", "full")
    drawn = frames(tmp_path / "out", "narrow", "axial", "full")
    assert (drawn.min(), drawn.max()) == (0, 255)
    text = page_of(tmp_path / "out", "narrow").all_text
    assert "-160 to 240 HU" in text
    index = Page(tmp_path / "out" / "index.html").all_text
    assert "window hu" in index and "9 8 7" in index


def test_grey_volumes_have_one_window(gallery: Path) -> None:
    folder = next(path for path in (gallery / "studies").iterdir() if (path / "axial-grey.png").is_file())
    assert {path.name for path in folder.iterdir()} == {
        "axial-grey.png",
        "coronal-grey.png",
        "sagittal-grey.png",
        "overview.png",
        "thumbnail.png",
    }


def test_index_reports_what_is_odd(gallery: Path) -> None:
    words = Page(gallery / "index.html").text["checks"]
    assert "patients in two splits: 1" in words
    assert "studies without any text: 1" in words
    assert "mute" in words
    assert "studies with the same voxels as another: 4" in words
    assert "rows or files that cannot be read ·" in words, "listed under none found"


def test_study_page_holds_report_labels_and_geometry(gallery: Path) -> None:
    page = page_of(gallery, "twin")
    assert FINDINGS in page.all_text
    assert IMPRESSION in page.all_text
    chips = [item["class"].split()[1] for item in page.attributes if item.get("class", "").startswith("chip ")]
    assert [chips.count(state) for state in ("present", "absent", "unknown")] == [17 + 1, 1, 1 + 1]
    for words in ("12 × 10 × 14", "3 × 2 × 1.5 mm", "36 × 20 × 21 mm", "int16, 0.0 MiB", "row checksum fits"):
        assert words in page.all_text


def test_one_damaged_row_is_shown_and_the_others_are_drawn(tmp_path: Path, capsys: Capture) -> None:
    source = write_rows(tmp_path / "clm_ct_rate_train.arrow", [{}, {}, {}])
    damage(source, noise(1).tobytes()[40:80])
    summary = draw(capsys, source, tmp_path / "out", code=1)
    assert (summary["drawn"], summary["bad"]) == (3, 1)
    assert "checksum does not fit" in page_of(tmp_path / "out", "train_1_a_1").all_text
    entries = json.loads(Page(tmp_path / "out" / "index.html").text["studies-data"])
    assert [entry["bad"] for entry in entries] == [False, True, False]
    assert frames(tmp_path / "out", "train_2_a_1", "axial").shape[0] == SHAPE_DHW[0]


def test_a_truncated_file_among_good_ones_is_named(arrows: Path, tmp_path: Path, capsys: Capture) -> None:
    for path in arrows.glob("*.arrow"):
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if "test" in path.name else data)
    assert draw(capsys, tmp_path, tmp_path / "out", code=1)["studies"] == 6
    assert "clm_ct_rate_test.arrow" in Page(tmp_path / "out" / "index.html").text["checks"]


def test_compressed_rows_are_drawn(tmp_path: Path, capsys: Capture) -> None:
    source = write_rows(tmp_path / "clm_ct_rate_val.arrow", [{"image": marked()}], compression="zstd")
    draw(capsys, source, tmp_path / "out")
    assert frames(tmp_path / "out", "val_0_a_1", "axial")[-1, 0, 0] > 200


def test_manifest_facts_are_shown(tmp_path: Path, capsys: Capture) -> None:
    source = write_rows(tmp_path / "clm_ct_rate_train.arrow", [{}])
    case = {"image_id": "train_0_a_1", "stored_shape_DHW": [40, 512, 512], "warnings": ["values look <odd>"]}
    left_out = [{"image_id": f"train_{n}_a_1", "path": "x", "reason": f"holds {n} of 9 bytes"} for n in (4, 5)]
    manifest = {"corpus": "clm_ct_rate", "file": source.name, "rows": 2, "cases": [case], "exclusions": left_out}
    source.with_suffix(".manifest.json").write_text(json.dumps(manifest))
    draw(capsys, source, tmp_path / "out")
    index = Page(tmp_path / "out" / "index.html").text["checks"]
    assert "scans left out before packing: 2" in index
    assert "holds … of … bytes (2)" in index
    assert "1 rows, its manifest says 2" in index
    study = page_of(tmp_path / "out", "train_0_a_1").all_text
    assert "40 × 512 × 512" in study
    assert "values look <odd>" in study


def test_raw_ct_rate_is_drawn_alike_whatever_its_axes(tmp_path: Path, capsys: Capture) -> None:
    root = ct_rate_tree(tmp_path / "root", ["LPS", "RAS", "PIR"])
    summary = draw(capsys, root, tmp_path / "out")
    assert summary["drawn"] == 3
    shown = [picture(tmp_path / "out", f"train_{number}_a_1", "coronal-lung") for number in (1, 2, 3)]
    assert np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[0], shown[2])
    assert "20 × 26 × 30" in page_of(tmp_path / "out", "train_2_a_1").all_text


def test_raw_scan_that_cannot_be_read_does_not_stop_the_run(tmp_path: Path, capsys: Capture) -> None:
    root = ct_rate_tree(tmp_path / "root", ["LPS", "LPS"])
    broken = next(root.rglob("train_1_a_1.nii.gz"))
    broken.write_bytes(broken.read_bytes()[:200])
    assert draw(capsys, root, tmp_path / "out", code=1)["bad"] == 1
    assert "truncated" in page_of(tmp_path / "out", "train_1_a_1").all_text


def test_raw_ctrg_says_that_its_spacing_is_assumed(tmp_path: Path, capsys: Capture) -> None:
    draw(capsys, ctrg_tree(tmp_path / "root"), tmp_path / "out")
    page = page_of(tmp_path / "out", "1")
    assert "The files hold no voxel size" in page.all_text
    assert frames(tmp_path / "out", "1", "axial", "grey")[-1].mean() < 60, "stored head to feet, shown feet first"


def test_own_table_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    save_nifti(tmp_path / "scans" / "one.nii.gz", chest())
    table = write_csv(
        tmp_path / "mine.csv", ["volume", "findings", "impression"], [["scans/one.nii.gz", FINDINGS, IMPRESSION]]
    )
    assert draw(capsys, table, tmp_path / "out")["drawn"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["missing"],
        ["."],
        ["note.txt"],
        ["empty.arrow"],
        ["x_train.arrow", "--ids", "nobody"],
        ["x_train.arrow", "--window", "wide"],
        ["x_train.arrow", "--limit", "-1"],
        ["x_train.arrow", "--out", "full"],
    ],
)
def test_refusals_are_short_and_write_nothing(
    words: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    if words != ["."]:
        (tmp_path / "empty.arrow").write_bytes(b"")
        write_rows(tmp_path / "x_train.arrow", [{}])
    before = sorted(tmp_path.rglob("*"))
    try:
        code: Any = main([*words[:1], "--out", "out", *words[1:]])
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr()
    assert code == 2
    assert 1 <= len(told.err.splitlines()) <= 5
    assert "mend" in told.err
    assert "Traceback" not in told.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_older_gallery_is_replaced(arrows: Path, tmp_path: Path, capsys: Capture) -> None:
    draw(capsys, arrows, tmp_path / "out", "--limit", "2")
    draw(capsys, arrows / "clm_ct_rate_train.arrow", tmp_path / "out", "--ids", "twin")
    assert [path.name for path in (tmp_path / "out" / "studies").glob("*.html")] == ["00003-twin.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_sample_is_seeded_and_holds_every_split() -> None:
    groups = (("a", "train", 900), ("a", "val", 20), ("a", "test", 60), ("b", "train", 4))
    names = [(corpus, split) for corpus, split, count in groups for _ in range(count)]
    tickets = [Ticket(number, str(number), *name) for number, name in enumerate(names)]
    first = choose(tickets, 30, 0)
    assert first == choose(tickets, 30, 0) != choose(tickets, 30, 1)
    assert len(first) == 30
    assert {(ticket.corpus, ticket.split) for ticket in first} == set(names)
    assert choose(tickets, 0, 0) == tickets


@pytest.mark.parametrize("words", [["--help"], ["nowhere", "--out", "x"]])
def test_help_and_refusals_load_no_torch(repository: Path, tmp_path: Path, words: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['visualize_datasets.py', *{words!r}]\n"
        "try:\n    runpy.run_path(sys.path.pop(), run_name='__main__')\n"
        "except SystemExit as ended:\n    print(ended.code)\n"
        "print([name for name in ('torch', 'monai', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    script = repository / "tools" / "visualize_datasets.py"
    program = f"import sys\nsys.path.append({str(script)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert done.stdout.splitlines()[-2:] == ["0" if words == ["--help"] else "2", "[]"]


def test_gallery_needs_no_torch(repository: Path, arrows: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tools.visualize_datasets import main\n"
        f"main([{str(arrows)!r}, '--out', {str(tmp_path / 'out')!r}, '--limit', '1'])\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars stay out of the captured text."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
