"""The file layer: encodings, separators, ragged rows; formulas are neutralised and come back as they were."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d.errors import DataError, OutputError
from mg3d.files import csv_text, decode_text, id_key, read_csv, read_text, write_csv
from mg3d.paths import visible_files

TURKISH = "id;findings\n1;Göğüs duvarı, işlem İyi\n"


def table(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, encoding: str = "") -> DataError:
    with pytest.raises(DataError) as caught:
        read_csv(path, ("id",), encoding=encoding)
    assert caught.value.path == str(path) and len(str(caught.value).splitlines()) <= 5
    return caught.value


def test_cells_stay_text(tmp_path: Path) -> None:
    path = table(tmp_path, 'id,text\r\n1,NA\r\n2,\r\n3,nan\r\n4,"a, ""b""\nc"\r\n5,x\0y\r\n')
    found = read_csv(path, ("id", "text"))
    assert [row["text"] for row in found.rows] == ["NA", "", "nan", 'a, "b"\nc', "x\0y"]
    assert found.encoding == "utf-8" and found.numbers == (2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", pytest.param("ascii", id="ascii")]
)
def test_utf_8_and_utf_16_are_recognised(tmp_path: Path, encoding: str) -> None:
    text = "id,text\n1,Röntgen 肺\n" if encoding != "ascii" else "id,text\n1,clear\n"
    found = read_csv(table(tmp_path, text.encode(encoding)), ("id",))
    assert found.columns == ("id", "text")
    assert found.rows[0]["text"] == ("Röntgen 肺" if encoding != "ascii" else "clear")


def test_a_turkish_table_is_refused_with_the_letters_and_the_way_out(tmp_path: Path) -> None:
    path = table(tmp_path, TURKISH.encode("cp1254"))
    said = refusal(path)
    assert said.message.startswith(f"{path}: row 2: ")
    assert "'öğüış" in said.message and "in cp1254" in said.message and "'öðü" in said.message
    assert "--encoding" in said.remedy and "duvar" not in str(said)
    found = read_csv(path, ("id",), encoding="cp1254")
    assert found.rows[0]["findings"] == "Göğüs duvarı, işlem İyi" and found.encoding == "cp1254"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("id,text\n1,左肺下叶结节\n", "gb18030"), ("id,text\n1,Größe 5×3\n", "cp1252"), ("id,text\n1,лёгкие\n", "cp1251")],
)
def test_other_encodings_are_read_by_name_only(tmp_path: Path, text: str, encoding: str) -> None:
    path = table(tmp_path, text.encode(encoding))
    assert "no UTF-8" in refusal(path).message
    assert read_csv(path, encoding=encoding).rows[0]["text"] == text.splitlines()[1][2:]


def test_a_named_encoding_never_makes_mojibake_of_utf_8(tmp_path: Path) -> None:
    assert "misread" in refusal(table(tmp_path, TURKISH.encode()), "cp1254").message
    assert read_csv(table(tmp_path, TURKISH.encode("utf-8-sig").replace("ı".encode(), b"i")), encoding="utf-8").rows
    marked = read_csv(table(tmp_path, TURKISH.encode("utf-16")), encoding="cp1254")
    assert marked.encoding == "utf-16" and "Göğüs" in marked.rows[0]["findings"]
    plain = read_csv(table(tmp_path, "id\n1\n"), encoding="cp1254")
    assert plain.rows == ({"id": "1"},)


def test_single_stray_bytes_among_utf_8_are_read_in_the_named_encoding(tmp_path: Path) -> None:
    rows = [b"id,text", "1,“quoted” 肺, größer".encode(), b"2,5\xd73 mm"]
    path = table(tmp_path, b"\n".join(rows))
    path.write_bytes(path.read_bytes().replace(b", gr", b"; gr"))
    assert refusal(path).message.startswith(f"{path}: row 3: 1 bytes")
    found = read_csv(path, encoding="cp1252")
    assert [row["text"] for row in found.rows] == ["“quoted” 肺; größer", "5×3 mm"]
    assert found.encoding == "utf-8, 1 bytes cp1252"
    with pytest.raises(DataError, match="0x81 does not exist in cp1252"):
        read_csv(table(tmp_path, b"id,text\n1,\x93a\x94 \x81\n"), encoding="cp1252")


def test_texts_that_are_no_tables_name_the_line(tmp_path: Path) -> None:
    path = table(tmp_path, b"one\ntwo \xf0\n")
    with pytest.raises(DataError, match="line 2"):
        read_text(path)
    assert read_text(path, "cp1254") == "one\ntwo ğ\n"
    with pytest.raises(DataError, match="workbook"):
        read_text(table(tmp_path, b"PK\x03\x04 and so on"))
    with pytest.raises(DataError, match="no such file"):
        read_text(tmp_path / "absent.txt")
    assert decode_text(b"", path) == ("", "utf-8")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("line", ["", "sep={}\r\n"], ids=["", "separator line of Excel"])
def test_the_separator_is_found_in_the_header(tmp_path: Path, separator: str, line: str) -> None:
    content = line.format(separator) + f"id{separator}text\n\n1{separator}" + '"a, b; c\td"\n'
    found = read_csv(table(tmp_path, content), ("id", "text"))
    assert found.rows == ({"id": "1", "text": "a, b; c\td"},)
    assert found.numbers == (3 + bool(line),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "column 'id' is missing"),
        ("name,text\n", "columns found: name, text"),
        ("id,id\n1,2\n", "column 'id' is there twice"),
        ("id,text\n1,a, b\n", "row 2 has 3 cells, the header 2"),
        ('id,text\n1,"never closed\n2,b\n', "row 2 is not readable"),
        ('id,text\n1,a\n2,"b"c\n', "repair the quotes"),
        ("id,text\n1," + "x" * (2**24 + 1), "row 2 is not readable"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str, words: str) -> None:
    assert words in str(refusal(table(tmp_path, content)))


def test_short_rows_are_filled_or_refused_as_asked(tmp_path: Path) -> None:
    path = table(tmp_path, "id,text\n1\n2,b,,\n , \n")
    assert read_csv(path).rows == ({"id": "1", "text": ""}, {"id": "2", "text": "b"})
    with pytest.raises(DataError, match="row 2 has 1 cells"):
        read_csv(path, whole_rows=True)


DANGEROUS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-no effusion",
    "@SUM(1)",
    "\tx",
    "\rx",
    "\nx",
    " =1",
    "＝1",
    "'=1",
    "''-x",
    "-",
    "'-0.5",
]
HARMLESS = ["-0.5", "+3", "1e-3", "-inf", "'quoted", "a=b", "", "x", "-1.5E+10", "clear, no effusion"]


def test_cells_that_a_spreadsheet_would_run_are_neutralised_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_csv(path, ["=id", "value"], [[text, 1.5] for text in (*DANGEROUS, *HARMLESS)])
    with path.open(newline="", encoding="utf-8") as stream:
        header, *lines = csv.reader(stream)
    assert header == ["'=id", "value"]
    assert [cells[0] for cells in lines] == [*(f"'{text}" for text in DANGEROUS), *HARMLESS]
    assert [row["=id"] for row in read_csv(path).rows] == [*DANGEROUS, *HARMLESS]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))), max_size=4))
def test_any_texts_survive_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "t.csv"
    write_csv(path, ["a", "b"], rows)
    kept = [row for row in rows if any(cell.strip() for cell in row)]
    assert [(row["a"], row["b"]) for row in read_csv(path, separators=(",",)).rows] == kept


def test_numbers_are_written_as_they_are_and_absent_cells_empty() -> None:
    assert csv_text(["a", "b"], [{"a": -0.5, "c": 1}, {"b": None, "a": 3}]) == "a,b\n-0.5,\n3,\n"


def test_names_with_bytes_that_are_no_text_are_written_too(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ["id"], [[os.fsdecode(b"scan\xff.nii")]])
    assert read_csv(tmp_path / "t.csv").rows == ({"id": "scan\\udcff.nii"},)


def test_a_table_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.csv"
    write_csv(path, ["a"], [["old"]])

    def rows() -> list[list[str]]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space"):
        write_csv(path, ["a"], (row for _ in "x" for row in rows()))
    assert path.read_text(encoding="utf-8") == "a\nold\n" and os.listdir(path.parent) == ["out.csv"]
    assert path.stat().st_mode & 0o044, "others may read it as any new file"


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    for name in ("b.nii", "._a.nii", ".hidden.nii", "a.nii"):
        (tmp_path / name).touch()
    assert [path.name for path in visible_files(tmp_path, "*.nii")] == ["a.nii", "b.nii"]
    assert visible_files(tmp_path / "absent", "*") == []


@pytest.mark.parametrize("same", [("001", "1", "1.0", " 1 ", "１"), ("P 07", "p  07"), ("0", "000", "0.0")])
def test_ids_that_a_spreadsheet_rewrote_have_one_key(same: tuple[str, ...]) -> None:
    assert len({id_key(name) for name in same}) == 1


def test_other_ids_have_other_keys() -> None:
    names = ["1", "10", "1.5", "-1", "p1", "p01", "1a", "1e3", "train_1", "train_01", ""]
    assert len({id_key(name) for name in names}) == len(names)


def test_no_other_place_reads_or_writes_tables(repository: Path) -> None:
    direct = re.compile(r"^\s*(?:import csv|from csv import)|\.to_csv\(|\bpd\.read_csv\(", re.MULTILINE)
    listed = [
        path for folder in ("mg3d", "prepro", "tools", "downstream") for path in (repository / folder).rglob("*.py")
    ]
    users = [
        path.relative_to(repository).as_posix() for path in listed if direct.search(path.read_text(encoding="utf-8"))
    ]
    assert users == ["mg3d/files.py"]
