"""Pictures of a run: what they show, read back from their pixels and from the page."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from mg3d.finetuning.pictures import (
    best_median_worst,
    confusion_png,
    curves_png,
    draw_run_figures,
    froc_png,
    overlay_png,
    roc_pr_png,
    write_report,
)
from mg3d.finetuning.pictures.run_figures import draw_overlays
from mg3d.metrics.froc import Candidates, Findings, froc

ORANGE = (0xE6, 0x9F, 0x00)  # the first class


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def close_to(picture: np.ndarray, shade: tuple[int, int, int], limit: int = 30) -> np.ndarray:
    return np.abs(picture - np.array(shade)).max(axis=-1) <= limit


def chest(shape: tuple[int, int, int] = (60, 48, 20)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey image, truth and prediction as (x, y, z)."""
    image = np.random.default_rng(0).normal(0, 30, shape) - 700
    truth, pred = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    truth[40:50, 20:30, 8:13], pred[42:52, 20:30, 8:13] = 1, 1
    return image, truth, pred


def test_three_planes_with_square_millimetres(tmp_path: Path) -> None:
    """A cube of 40 mm in voxels of 1 x 2 x 4 mm is drawn as a square on every plane."""
    image, truth = np.zeros((80, 40, 20)), np.zeros((80, 40, 20), np.uint8)
    truth[20:60, 10:30, 5:15] = 1
    path = overlay_png(image, truth, truth, (1, 2, 4), ["cube"], tmp_path / "o.png")
    found = close_to(pixels(path), ORANGE)
    found[int(found.shape[0] * 0.9) :] = False  # the legend
    third = found.shape[1] // 3
    for k in range(3):
        rows, columns = np.nonzero(found[:, k * third : (k + 1) * third])
        assert (np.ptp(rows) + 1) / (np.ptp(columns) + 1) == pytest.approx(1, abs=0.05), k


def test_right_is_left_and_the_head_is_up_whatever_the_storage(tmp_path: Path) -> None:
    image, truth, _ = chest()
    reference = pixels(overlay_png(image, truth, truth, (1, 1, 3), ["a"], tmp_path / "ras.png", orientation="RAS"))
    lps = [array[::-1, ::-1] for array in (image, truth, truth)]
    assert (pixels(overlay_png(*lps, (1, 1, 3), ["a"], tmp_path / "l.png", orientation="LPS")) == reference).all()
    spl = [array.transpose(2, 1, 0) for array in lps]
    assert (pixels(overlay_png(*spl, (3, 1, 1), ["a"], tmp_path / "z.png", orientation="SPL")) == reference).all()
    orange = close_to(reference, ORANGE)
    first = orange[: orange.shape[0] // 2, : orange.shape[1] // 3]  # axial, whole slice
    assert np.nonzero(first)[1].mean() < first.shape[1] / 2  # x rises to the right of the patient, drawn on the left
    with pytest.raises(ValueError, match="orientation"):
        overlay_png(image, truth, truth, (1, 1, 1), ["a"], tmp_path / "x.png", orientation="RAR")
    with pytest.raises(ValueError, match="shape"):
        overlay_png(image, truth[1:], truth, (1, 1, 1), ["a"], tmp_path / "x.png")


def test_small_lesions_get_a_close_view_and_empty_maps_are_no_error(tmp_path: Path) -> None:
    image, truth, pred = chest((200, 200, 40))
    near = pixels(overlay_png(image, truth, pred, (1, 1, 3), ["a"], tmp_path / "near.png"))
    far = pixels(
        overlay_png(
            image[30:60, 10:40, 5:15],
            truth[30:60, 10:40, 5:15],
            pred[30:60, 10:40, 5:15],
            (1, 1, 3),
            ["a"],
            tmp_path / "far.png",
        )
    )
    assert near.shape[0] > 1.5 * far.shape[0]
    empty = np.zeros_like(truth)
    assert overlay_png(image, empty, empty, (1, 1, 3), ["a"], tmp_path / "none.png").is_file()
    assert overlay_png(image, empty, pred, (1, 1, 3), ["a"], tmp_path / "invented.png").is_file()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_best_median_and_worst_case() -> None:
    rows = [{"id": f"c{k}", "dice": value} for k, value in enumerate([0.2, 0.9, 0.5, 0.7, math.nan])]
    assert best_median_worst(rows) == {"best": "c1", "median": "c3", "worst": "c0"}
    rows += [{"id": "c1", "dice": "0.1"}, {"id": "c0", "dice": ""}]
    assert best_median_worst(rows)["best"] == "c3"
    assert best_median_worst(rows[:1]) == {"best": "c0"}
    assert best_median_worst(rows[:2]) == {"best": "c1", "worst": "c0"}
    assert best_median_worst([]) == {}


@pytest.mark.realdata
def test_overlays_of_a_real_scan(tmp_path: Path, shared_dir: Path) -> None:
    scan = shared_dir / "data/ct/lidc_0314_chest_2mm.nii.gz"
    check_overlay(tmp_path, scan, scan.with_name("lidc_0314_chest_2mm_nodule_readers.nii.gz"))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL"])
def test_overlays_of_files_in_any_geometry(tmp_path: Path, axes: str) -> None:
    """A lesion that four readers marked, each a little larger than the one before."""
    image, _, _ = chest((90, 80, 60))
    readers = np.zeros(image.shape, np.uint8)
    for reader in range(1, 5):
        edge = slice(30 + reader, 46 - reader)
        readers[edge, edge, edge] = reader
    turn = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(codes) for codes in ("RAS", axes)))
    for name, voxels in {"scan": image.astype(np.int16), "readers": readers}.items():
        nib.save(
            nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])).as_reoriented(turn), tmp_path / f"{name}.nii.gz"
        )
    check_overlay(tmp_path, tmp_path / "scan.nii.gz", tmp_path / "readers.nii.gz")


def check_overlay(tmp_path: Path, scan: Path, readers: Path) -> None:
    """The picture of a case whose prediction is what three readers marked."""
    source = nib.load(readers)
    pred = tmp_path / "pred.nii.gz"
    nib.save(nib.Nifti1Image((np.asarray(source.dataobj) >= 3).astype(np.uint8), source.affine), pred)
    rows = [{"id": "a", "class": "nodule", "dice": 0.8}, {"id": "b", "class": "nodule", "dice": 0.1}]
    files = {"a": (scan, readers, pred)}
    figures = draw_overlays(tmp_path, rows, files, ["nodule"], {1: 1, 2: 1, 3: 1, 4: 1}, window=(-1000, 400))
    assert list(figures) == ["best case a: dice nodule 0.800"]
    assert close_to(pixels(next(iter(figures.values()))), ORANGE).sum() > 300


def step_log(folder: Path) -> Path:
    lines = [{"step": k, "epoch": k // 10, "loss": 1 / (k + 1), "lr": [1e-3, 2e-3]} for k in range(60)]
    lines[20]["loss"] = "nan"
    found = [{"step": 30, "val/dice": 0.5, "val/the_metric": 0.5}, {"step": 60, "val/dice": 0.7}]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo'
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder / "metrics.jsonl"


def test_curves_of_a_run_and_of_one_that_has_not_begun(tmp_path: Path) -> None:
    path = curves_png(step_log(tmp_path), tmp_path / "curves.png")
    assert path is not None and pixels(path).shape[1] > 3 * 400
    (tmp_path / "validation.jsonl").unlink()
    path = curves_png(tmp_path / "metrics.jsonl", tmp_path / "two.png")
    assert path is not None and pixels(path).shape[1] < 3 * 400
    assert curves_png(tmp_path / "absent.jsonl", tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_curves_of_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 50)
    probs = rng.dirichlet(np.ones(3), 50)
    assert roc_pr_png(probs, targets, ["a", "b", "c"], tmp_path / "roc.png").is_file()
    assert roc_pr_png(probs[:, :1], np.ones(50), ["only"], tmp_path / "one.png").is_file()
    with pytest.raises(ValueError, match="names"):
        roc_pr_png(probs, targets, ["a"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="classes"):
        confusion_png([[1, 2]], ["a"], tmp_path / "x.png")
    scans = [f"s{k}" for k in range(20)]
    result = froc(
        Candidates(scans * 2, np.repeat([[0.0] * 3, [9.0] * 3], 20, axis=0), rng.random(40)),
        Findings(scans, np.zeros((20, 3)), np.full(20, 4.0)),
        scans,
        rounds=20,
    )
    assert froc_png(result.entries(), tmp_path / "froc.png").is_file()
    metrics = {**result.entries(), "notes": [], "protocol": "clean"}
    assert list(draw_run_figures(tmp_path, [], metrics)) == ["Free-response ROC"]
    undefined = {name: {**entry, "mean": None} for name, entry in result.entries().items()}
    assert draw_run_figures(tmp_path, [], undefined) == {}
    with pytest.raises(ValueError, match="froc@"):
        froc_png(undefined, tmp_path / "x.png")


class Page(HTMLParser):
    """Texts, tags and sources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(str(found["src"]))
        self.links += [str(found[key]) for key in ("href", "src") if key in found and tag != "img"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_holds_everything_and_escapes_everything(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    rows = [{"id": f"{evil}{k}", "patient": k, "target": k % 2, "prob_sick": 0.1 * k} for k in range(10)]
    step_log(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "name": evil}), encoding="utf-8")
    figures = draw_run_figures(tmp_path, rows)
    assert len(figures) == 3
    metrics = {
        "auroc": {"mean": 0.8123, "ci95": [0.7, 0.9], "n": 10, "per_class": {evil: {"mean": 0.5}, "b": None}},
        "auroc/scan=1": {"mean": 0.4321, "ci95": None, "n": 3},
        "ap": {"mean": None, "ci95": None, "n": 0},
        "protocol": "clean",
        "notes": [evil, "selection = reporting"],
    }
    page = write_report(tmp_path, metrics, rows, {**figures, "missing": tmp_path / "no.png"}, title=evil)
    text = page.read_text(encoding="utf-8")
    read = Page(text)
    assert "script" not in read.tags and read.links == []
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[\w+/=]+", "", text))
    assert len(read.images) == 3
    for source, figure in zip(read.images, figures.values(), strict=True):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == figure.read_bytes()
    for words in (
        "0.8123",
        "0.7000 to 0.9000",
        "protocol: clean",
        "selection = reporting",
        "0.4321",
        '"seed": 3',
        f"{evil}9",
    ):
        assert words in read.text, words


def test_long_tables_are_cut_and_say_so(tmp_path: Path) -> None:
    rows = [{"id": str(k), "dice": k / 700} for k in range(700)]
    text = write_report(tmp_path, {}, rows).read_text(encoding="utf-8")
    assert "200 more are in per_case.csv" in text and text.count("<tr>") == 501


def test_segmentation_rows_give_a_picture_of_all_scores(tmp_path: Path) -> None:
    rows = [{"id": str(k), "class": name, "dice": value} for name in ("RV", "LV") for k, value in enumerate((0.5, ""))]
    assert list(draw_run_figures(tmp_path, rows)) == ["Dice of every case, with the median of each class"]
    assert draw_run_figures(tmp_path, []) == {}


def test_importing_needs_neither_matplotlib_nor_torch(repository: Path) -> None:
    program = "import sys, mg3d.finetuning.pictures; print(*{'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, encoding="utf-8", check=True
    )
    assert told.stdout.strip() == ""
