"""Tables as people really save them: encodings, separators, quotes, ragged rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from mg3d.errors import DataError
from prepro.readers.tables import SEPARATORS, confined_path, read_table, strip_suffix


def _table(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_cells_stay_text(tmp_path: Path) -> None:
    path = _table(tmp_path, 'id,text\r\n1,NA\r\n2,\r\n3,nan\r\n4,"a, ""b""\nc"\r\n5,x\0y\r\n')
    table = read_table(path, ("id", "text"))
    assert [row["text"] for row in table.rows] == ["NA", "", "nan", 'a, "b"\nc', "x\0y"]
    assert table.not_utf8 == ()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_the_first_name(tmp_path: Path, encoding: str) -> None:
    table = read_table(_table(tmp_path, "id,text\n1,Röntgen 肺\n".encode(encoding)), ("id",))
    assert table.columns == ("id", "text")
    assert table.rows[0]["text"] == "Röntgen 肺"
    assert table.not_utf8 == ()


def test_latin_1_rows_are_read_and_numbered(tmp_path: Path) -> None:
    rows = ["id,text", "1,plain", "2,Größe 5×3", "3,“quoted” 肺"]
    content = b"\n".join(row.encode("latin-1" if row[0] == "2" else "utf-8") for row in rows)
    table = read_table(_table(tmp_path, content))
    assert [row["text"] for row in table.rows] == ["plain", "Größe 5×3", "“quoted” 肺"]
    assert table.not_utf8 == (3,)
    windows = read_table(_table(tmp_path, b"id,text\n1,\x93a\x94 \x81\n"))
    assert windows.rows[0]["text"] == "“a” \x81"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_found_in_the_header(tmp_path: Path, separator: str) -> None:
    content = f"id{separator}text\n1{separator}" + '"a, b; c\td"\n'
    (row,) = read_table(_table(tmp_path, content), ("id", "text"), SEPARATORS).rows
    assert row == {"id": "1", "text": "a, b; c\td"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "column 'id' is missing"),
        ("name,text\n", "columns found: name, text"),
        ("id,id\n1,2\n", "column 'id' is there twice"),
        ("id,text\n1,a, b\n", "row 2 has 3 cells, the header 2"),
        ('id,text\n1,"never closed\n2,b\n', "repair the quotes"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_table(_table(tmp_path, content), ("id",))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_short_rows_and_empty_extra_cells_are_harmless(tmp_path: Path) -> None:
    table = read_table(_table(tmp_path, "id,text\n1\n2,b,,\n"))
    assert table.rows == ({"id": "1", "text": ""}, {"id": "2", "text": "b"})


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.nii.gz", "a"),
        ("a.NII", "a"),
        ("a.nii.gz.npz", "a"),
        ("v1.2.mha", "v1.2"),
        ("folder", "folder"),
        ("x/a.npz", "x/a"),
    ],
)
def test_scan_endings_are_dropped(name: str, stem: str) -> None:
    assert strip_suffix(name) == stem


@pytest.mark.parametrize(
    "entry",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "link/x",
        "a\0b",
        "./../root2/x",
        "a/b/../../../x",
        "..",
        "//etc/x",
        "up/../x",
        "../root2",
    ],
)
def test_no_entry_leaves_its_root(tmp_path: Path, entry: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "root" / "up").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError):
        confined_path(tmp_path / "root", entry)
    assert confined_path(tmp_path / "root", "./a/../b.nii") == (tmp_path / "root" / "b.nii").resolve()
