"""Paths of tables: endings are dropped, nothing leaves its root, paths written on Windows are understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from mg3d.errors import DataError
from mg3d.paths import confined_path
from prepro.readers.tables import strip_suffix


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
        "..\\x",
        "a\\..\\..\\x",
        "link\\x",
        "C:\\data\\x.nii.gz",
        "c:/../../x\\y",
        "\\\\server\\share\\x",
        "\\etc\\passwd",
        "x" * 5000,
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


def test_a_path_written_on_windows_is_understood_where_no_file_has_that_name(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii.gz").touch()
    assert confined_path(tmp_path, ".\\scans\\a.nii.gz") == (tmp_path / "scans" / "a.nii.gz").resolve()
    (tmp_path / "odd\\name.nii.gz").touch()
    assert confined_path(tmp_path, "odd\\name.nii.gz").name == "odd\\name.nii.gz"
    with pytest.raises(DataError, match="Windows drive"):
        confined_path(tmp_path, "D:\\scans\\a.nii.gz")
