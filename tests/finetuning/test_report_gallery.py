"""The report gallery: which cases, what is marked, and a page that holds everything and runs nothing foreign."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mg3d.errors import DataError
from mg3d.finetuning.report_gallery import GalleryCase, choose_cases, draw_panes, mark_findings, write_gallery
from mg3d.phantoms.report import stated_findings

EVIL = "<script>alert(1)</script> Emphysema is present. <img src=x onerror=alert(2)> & more"
CASES = [
    GalleryCase("perfect", "Cardiomegaly is present. No emphysema.", "There is cardiomegaly. No emphysema."),
    GalleryCase("half", "Cardiomegaly is present. Lung nodule is seen.", "Cardiomegaly. Emphysema is seen."),
    GalleryCase("empty", "Emphysema is present.", ""),
    GalleryCase('evil"id<b>', "No finding.", EVIL, {"label-to-report": "Emphysema is present."}),
    GalleryCase("none", "No finding.", "No finding."),
]


def page(tmp_path: Path, cases: list[GalleryCase] = CASES, **options: Any) -> tuple[str, dict[str, Any]]:
    path = tmp_path / "new" / "page.html"
    told = write_gallery(path, cases, reader=stated_findings, **options)
    return path.read_text(encoding="utf-8"), told


def article(text: str, name: str) -> str:
    return next(part for part in text.split("<article")[1:] if f"<h2>{name}</h2>" in part).split("</article>")[0]


def test_findings_are_matched_missed_and_invented(tmp_path: Path) -> None:
    half = article(page(tmp_path)[0], "half")
    assert re.findall(r'class="chip (\w+)">.\s([\w ]+)<', half) == [
        ("matched", "Cardiomegaly"),
        ("missed", "Lung nodule"),
        ("invented", "Emphysema"),
    ]
    marks = [(kind, " ".join(words.split())) for kind, words in re.findall(r'<mark class="(\w+)">([^<]*)', half)]
    assert marks == [
        ("matched", "Cardiomegaly is present."),
        ("missed", "Lung nodule is seen."),
        ("matched", "Cardiomegaly."),
        ("invented", "Emphysema is seen."),
    ]


def test_marked_pieces_give_the_text_again() -> None:
    text = "No emphysema.\n\nCardiomegaly and lung nodule of 1.5 mm are seen.  Fine"
    pieces = mark_findings(text, stated_findings, {"Cardiomegaly": "matched", "Lung nodule": "missed"})
    assert "".join(piece.text for piece in pieces) == text
    (mixed,) = [piece for piece in pieces if piece.status]
    assert mixed.status == "missed" and mixed.findings == (("Cardiomegaly", "matched"), ("Lung nodule", "missed"))
    assert mark_findings("", stated_findings, {}) == []
    assert [piece.status for piece in mark_findings(text, None, {})] == ["", "", ""]


def test_texts_are_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    text, told = page(tmp_path, volumes=lambda name: np.full((4, 4, 4), 0.5) if name == "half" else None)
    assert text.startswith("<!doctype html>")
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<img src=x" not in text and '"id<b>' not in text
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link", text)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', text))
    assert told["pictures"] == 1 and told["shown"] == 5 and told["cases"] == 5
    assert told["bytes"] == len(text.encode()) and f"{told['bytes'] / 1e3:.0f} kB" in text
    assert not re.search(r"\son\w+=", re.sub(r"&lt;.*?&gt;", "", text)) and "tabindex" not in text


def test_empty_generations_and_baselines_are_shown(tmp_path: Path) -> None:
    text, _ = page(tmp_path)
    assert '<p class="none">empty</p>' in article(text, "empty")
    assert "<summary>label-to-report</summary>" in article(text, "evil&#34;id&lt;b&gt;")
    assert "findings_f1 <b>1.000</b>" in article(text, "none")


def test_a_third_each_is_worst_best_and_random() -> None:
    values = [(float(number),) for number in range(30)]
    chosen = choose_cases(values, 9)
    assert [number for number, group in chosen.items() if group == "worst"] == [0, 1, 2]
    assert [number for number, group in chosen.items() if group == "best"] == [29, 28, 27]
    assert len([number for number, group in chosen.items() if group == "random" and 2 < number < 27]) == 3
    assert choose_cases(values, 9) == chosen and choose_cases(values, 9, seed=1) != chosen
    assert len(choose_cases(values, 1)) == 1 and set(choose_cases(values[:4], 99)) == {0, 1, 2, 3}
    assert list(choose_cases([(1.0,), (0.0,)], 2)) == [1, 0]


def test_the_order_may_be_another_score(tmp_path: Path) -> None:
    text, _ = page(tmp_path, order_by="rouge_l", count=1)
    assert text.count("<article") == 1 and "<h2>empty</h2>" in text
    with pytest.raises(DataError, match="rouge_x"):
        page(tmp_path, order_by="rouge_x")
    with pytest.raises(DataError, match="there twice"):
        page(tmp_path, [CASES[0], CASES[0]])
    with pytest.raises(DataError, match="0 cases"):
        page(tmp_path, [])


def test_without_a_reader_nothing_is_marked(tmp_path: Path) -> None:
    write_gallery(tmp_path / "page.html", CASES[:2])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<mark" not in text and "No reader of findings" in text and "findings_f1" not in text


def test_slices_lie_as_a_radiologist_expects() -> None:
    voxels = np.zeros((8, 6, 8), dtype=np.float32)
    voxels[7] = 1.0  # the top of the chest
    panes = {pane.plane.name: pane for pane in draw_panes(voxels)}
    assert [len(panes[name].positions) for name in ("axial", "coronal", "sagittal")] == [8, 6, 8]
    kind, data = panes["coronal"].uri.removeprefix("data:image/").split(";base64,")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
    frame = picture[: panes["coronal"].height]
    assert kind in ("webp", "jpeg") and frame[2].mean() > 200 and frame[-3].mean() < 30
    assert panes["axial"].width / panes["axial"].height == pytest.approx(128 / 96, rel=0.05)
    assert len(draw_panes(np.zeros((128, 96, 128)))[0].positions) == 16
    for bad in (np.zeros((3, 3)), np.full((2, 2, 2), np.nan)):
        with pytest.raises(DataError, match="picture of shape"):
            draw_panes(bad)
