"""``tools/explain.py``: page and pictures, where the report may come from, and what is refused."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mg3d.inference.model import load_model
from mg3d.scans.slices import HU_WINDOWS
from tests.inference.tiny_weights import checkpoint, chest_hu, network, save_nifti
from tests.tools.command import answer, modules_after, refusal
from tools.explain import main, refuse_foreign_folder
from tools.explanation.colours import DIVERGING, RISING, diverging_contrast
from tools.explanation.pictures import draw_sentence, value_text
from tools.reports import ReportTable, read_report

FINDINGS = "The heart is clear. No pleural effusion is present. The lungs are <b>clear</b> & fine."
IMPRESSION = "No cardiomegaly is present."
TEXT = ("--findings", FINDINGS, "--impression", IMPRESSION)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nifti(tmp_path_factory.mktemp("scans") / "chest_7.nii.gz", chest_hu())


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="maps">(.*?)</script>', page, re.S).group(1))


def test_a_scan_and_its_report_become_one_page_and_a_picture_per_sentence(
    weights: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "explained"
    told = answer(capsys, main, scan, "--weights", weights, *TEXT, "--out", out)
    assert (told["scan"], told["sentences"], told["not_read"]) == ("chest_7", 4, 0)
    assert sorted(path.name for path in out.iterdir()) == ["index.html", *(f"sentence_00{n}.png" for n in range(1, 5))]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert told["bytes"] == (out / "index.html").stat().st_size
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:image/png;base64,") or source.endswith(".png") for source in sources)
    assert "http://" not in page and "https://" not in page and str(tmp_path) not in page
    assert (
        "Not a diagnosis" in page and "<b>clear</b>" not in page and "&lt;b&gt;" not in page
    )  # markup is cleaned away
    for letter in "RLAPSI":
        assert re.search(rf'<b class="letter \w+">{letter}</b>', page)
    data = embedded(page)
    assert data["grid"] == told["map_grid"] == told["token_grid"]
    for contrast in data["contrasts"]:
        values = np.frombuffer(base64.b64decode(contrast["values"]), "<f4").reshape(4, *data["grid"])
        assert contrast["low"] <= values.min() + 1e-6 and values.max() <= contrast["high"] + 1e-6
    gates, relative, placed = (
        np.frombuffer(base64.b64decode(each["values"]), "<f4").reshape(4, -1) for each in data["contrasts"]
    )
    assert np.allclose(relative, gates - gates.mean(0), atol=1e-6)
    assert np.allclose(placed.mean(1), 0, atol=1e-6)
    assert told["largest_spread"] == pytest.approx(float(np.ptp(gates, axis=1).max()), abs=1e-5)
    with Image.open(out / "sentence_002.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) > 300


def test_the_numbers_are_those_of_the_fusion_layers(
    weights: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, main, scan, "--weights", weights, "--findings", "no pleural effusion is present.", "--out", tmp_path)
    shown = np.frombuffer(
        base64.b64decode(embedded((tmp_path / "index.html").read_text(encoding="utf-8"))["contrasts"][0]["values"]),
        "<f4",
    )
    model = load_model(weights)
    volume = torch.from_numpy(model.processor(scan).volumes)
    ids = model.tokenizer("no pleural effusion is present.")["input_ids"]
    padded = torch.zeros(1, model.network.options.max_text_len, dtype=torch.long)
    padded[0, : len(ids)] = torch.tensor(ids)
    net = network()
    with torch.no_grad():
        text = net.project_text(net.contextualize_text(net.embed_text(padded), (padded != 0).long()))
        image = net.project_image(net.vision_encoder.tokens(volume))
        gates = []
        for layer in net.local_text_cross_multihead_attention:
            text, _, image, probs = layer(text, image)
            gates.append(probs[0, :, 1 : len(ids) - 1].mean(1))
    assert np.allclose(shown, torch.stack(gates).mean(0).numpy(), atol=1e-5)


def test_shifts_give_a_finer_grid(
    weights: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, main, scan, "--weights", weights, *TEXT, "--out", tmp_path, "--shifts", 2)
    assert told["map_grid"] == [2 * cells for cells in told["token_grid"]]


def test_a_report_comes_from_text_json_or_table(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("Findings: The lungs are clear.\nNo effusion.\n\nIMPRESSION:\nNormal heart.", encoding="utf-8")
    marked = tmp_path / "marked.md"
    marked.write_bytes(
        "\ufeff## **Findings:** The lungs are clear. No effusion.\n## Conclusion\nNormal heart.".encode()
    )
    structured = tmp_path / "report.json"
    structured.write_text('{"Findings": "The lungs are clear. No effusion.", "impression": "Normal heart."}')
    for path in (plain, marked, structured):
        found = read_report(path)
        assert (found.findings, found.impression) == ("The lungs are clear. No effusion.", "Normal heart."), path
    bare = tmp_path / "bare.txt"
    bare.write_text("Findings of earlier scans persist. Lungs clear.")
    assert read_report(bare).impression == "" and read_report(bare).findings.startswith("Findings of earlier")
    table = tmp_path / "reports.csv"
    table.write_text(
        "VolumeName,Findings_EN,Impressions_EN,Patient ID\n"
        "a/ct.nii.gz,One.,First.,p1\nb/ct.nii.gz,Two.,Second.,p2\nlone.nii.gz,Three.,,\n"
    )
    reports = ReportTable.open(table)
    assert reports.report("/data/b/ct.nrrd").findings == "Two."
    assert reports.report("a/ct") == ("One.", "First.", "p1", None)
    assert reports.match("/data/c/lone.mha") == "lone" and reports.match("nowhere.nii") is None
    with pytest.raises(Exception, match="2 rows fit"):
        reports.report("ct.nii.gz")


def test_a_table_with_the_scan_is_enough(
    weights: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "reports.csv"
    table.write_text("scan;report\nchest_6;The heart is large.\nchest_7.nii.gz;No pleural effusion is present.\n")
    told = answer(capsys, main, scan, "--weights", weights, "--reports", table, "--out", tmp_path / "out")
    assert told["sentences"] == 1
    assert "no pleural effusion is present." in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_what_the_model_cannot_read_is_listed(
    weights: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(f"The lungs are clear {number}." for number in range(12))
    told = answer(capsys, main, scan, "--weights", weights, "--findings", long, "--out", tmp_path)
    assert told["sentences"] + told["not_read"] == 12 and told["not_read"] > 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.index("Not read by the model") < page.index("the lungs are clear 11.")


def test_bad_input_is_refused_and_leaves_nothing(
    weights: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    rest = ("--weights", weights, "--out", out)
    assert "one report is needed" in refusal(capsys, main, scan, *rest)
    assert "one report is needed" in refusal(capsys, main, scan, *rest, *TEXT, "--report", scan)
    assert "no text" in refusal(capsys, main, scan, *rest, "--report", scan)
    assert "empty" in refusal(capsys, main, scan, *rest, "--findings", " nan ", "--impression", "")
    assert "no such" in refusal(capsys, main, tmp_path / "none.nii", *rest, *TEXT)
    assert "no weights" in refusal(capsys, main, scan, "--weights", tmp_path / "w.ckpt", "--out", out, *TEXT)
    table = tmp_path / "reports.csv"
    table.write_text("scan,findings\nother,The lungs are clear.\n")
    assert "no row for this scan" in refusal(capsys, main, scan, *rest, "--reports", table)
    flat = save_nifti(tmp_path / "flat.nii.gz", chest_hu()[:1])
    refusal(capsys, main, flat, *rest, *TEXT)
    assert not out.exists() and not list(tmp_path.glob(".*tmp"))
    alone = {f"vision_encoder.{key}": value for key, value in network().vision_encoder.state_dict().items()}
    torch.save(alone, tmp_path / "encoder.pt")
    assert "image encoder alone" in refusal(
        capsys, main, scan, "--weights", tmp_path / "encoder.pt", "--out", out, *TEXT
    )


def test_a_folder_with_something_else_is_left_alone(
    weights: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert "something else" in refusal(capsys, main, scan, "--weights", weights, *TEXT, "--out", tmp_path)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"
    older = tmp_path / "older"
    answer(capsys, main, scan, "--weights", weights, *TEXT, "--out", older)
    refuse_foreign_folder(older)
    answer(capsys, main, scan, "--weights", weights, "--impression", IMPRESSION, "--out", older)
    assert not (older / "sentence_002.png").exists()


def test_colours_lie_where_the_map_is_high() -> None:
    voxels = np.full((40, 40, 40), -1000, np.int16)
    maps = np.zeros((2, 4, 4, 4), np.float32)
    maps[1, 0, 0, 3] = 1.0  # low, in front, on the patient's left
    contrast = diverging_contrast("relative", "planted", "", maps)
    still = draw_sentence(voxels, (2.0, 2.0, 2.0), HU_WINDOWS["full"], [contrast], 1, "planted", (0.1, 0.1, 0.9))
    pixels = np.asarray(still).astype(int)
    red = (pixels[..., 0] - pixels[..., 2] > 60)[:, : 3 * 308]
    rows, columns = np.nonzero(red)
    axial, coronal = columns < 308, (columns >= 308) & (columns < 616)
    head = still.height - 300 - 8
    assert rows[axial].mean() < head + 150 and columns[axial].mean() > 150  # front is up, left is right
    assert rows[coronal].mean() > head + 150 and columns[coronal].mean() - 308 > 150  # inferior is down
    assert not (np.asarray(still)[..., 0] == 255).all()


def test_scales_and_numbers() -> None:
    assert DIVERGING.paint(np.array([0.0]), -1, 1)[0, 3] < 20
    low, high = DIVERGING.paint(np.array([-5.0, 5.0]), -1, 1)
    assert low[2] > low[0] and high[0] > high[2] and low[3] == high[3] == 255
    assert RISING.table[0, 3] < RISING.table[-1, 3]
    contrast = diverging_contrast("x", "x", "", np.array([[-0.004, 0.002]]))
    assert value_text(0.00312, contrast) == "+0.0031" and value_text(-1e-6, contrast) == "0"
    assert (contrast.low, contrast.high) == (-0.004, 0.004)


def test_help_and_refusals_need_no_torch(repository: Path, tmp_path: Path) -> None:
    assert modules_after(repository, "tools.explain", "--help") == (0, set())
    (tmp_path / "scan.nii").write_bytes(b"x")
    words = (
        tmp_path / "scan.nii",
        "--weights",
        "nowhere.ckpt",
        "--out",
        tmp_path / "out",
        "--findings",
        "Lungs clear.",
    )
    assert modules_after(repository, "tools.explain", *words) == (2, set())
