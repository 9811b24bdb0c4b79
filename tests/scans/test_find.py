"""The search for scans: links, loops, special files, and what is left out counted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from dicom_bytes import save_slices
from prepro_builders import chest, save_nifti

from mg3d.errors import DataError
from mg3d.scans.find import FoundScans, find_scans
from mg3d.scans.folders import PassedOver, files_in, walk_folders


def names(found: FoundScans) -> list[str]:
    return [scan.name for scan in found]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One case in the folder, two in a store beside it, one in a hidden store inside."""
    for place in ("scans/case_1", "store/case_2", "store/case_3", "scans/.store/case_4"):
        save_nifti(tmp_path / place / "ct.nii.gz", chest())
    return tmp_path / "scans"


def test_linked_folders_inside_are_searched_and_those_outside_are_counted(tree: Path) -> None:
    (tree / "case_2").symlink_to(tree.parent / "store" / "case_2")
    (tree / "case_3").symlink_to(Path("..") / "store" / "case_3")
    (tree / "case_4").symlink_to(Path(".store") / "case_4")
    found = find_scans(tree)
    assert names(found) == ["case_1/ct.nii.gz", "case_4/ct.nii.gz"]
    assert found.passed_over.counts() == {"links_left_out": 2}
    (line,) = found.passed_over.lines()
    assert line.startswith("2 links to folders outside") and "--follow-links" in line and "case_2" in line
    found = find_scans(tree, follow_links=True)
    assert names(found) == [f"case_{number}/ct.nii.gz" for number in range(1, 5)]
    assert found.passed_over.counts() == {} and found.passed_over.lines() == []


@pytest.mark.parametrize("follow", [True, False])
def test_every_real_folder_counts_once_and_loops_end(tree: Path, follow: bool) -> None:
    (tree / "a_again").symlink_to(tree / "case_1")
    (tree / "b_again").symlink_to(tree / "case_1")
    (tree / "case_1" / "up").symlink_to(tree)
    (tree / "self").symlink_to(tree / "self")
    if follow:
        (tree / "above").symlink_to(tree.parent)
    found = find_scans(tree, follow_links=follow)
    assert sum(name.endswith("case_1/ct.nii.gz") for name in names(found)) == 1
    assert len(found) == (3 if follow else 1)


def test_a_linked_root_and_linked_files_are_read(tree: Path) -> None:
    (tree / "case_1" / "linked.nii.gz").symlink_to(tree.parent / "store" / "case_2" / "ct.nii.gz")
    (tree / "case_1" / "lost.nii.gz").symlink_to(tree.parent / "nowhere.nii.gz")
    (tree.parent / "entry").symlink_to(tree)
    wanted = ["case_1/ct.nii.gz", "case_1/linked.nii.gz", "case_1/lost.nii.gz"]  # the last one fails where it is read
    assert names(find_scans(tree.parent / "entry")) == wanted


def test_special_files_are_counted_and_never_opened(tree: Path) -> None:
    os.mkfifo(tree / "case_1" / "pipe.nii.gz")
    os.mkfifo(tree / "case_1" / "0001")
    (tree / "bare").mkdir()
    os.mkfifo(tree / "bare" / "0001")
    os.mkfifo(tree / "bare" / "a.dcm")
    (tree / "bare" / "linked.dcm").symlink_to(tree / "bare" / "a.dcm")
    (tree / "device.nii").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tree / "bare" / "socket"))
    found = find_scans(tree)
    listener.close()
    assert names(found) == ["case_1/ct.nii.gz"]
    assert found.passed_over.counts() == {"special_files_left_out": 7}
    with pytest.raises(DataError, match="no scan in this folder; 4 pipes, sockets or devices left out"):
        find_scans(tree / "bare")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_scans(tree / "bare" / "a.dcm")
    assert files_in(tree / "bare") == []


def test_a_vanished_folder_is_counted(tree: Path) -> None:
    passed_over = PassedOver()
    for folder, _ in walk_folders(tree.parent, passed_over):
        if folder == tree.parent:
            for file in (tree.parent / "store").rglob("*.gz"):
                file.unlink()
            for place in ("case_2", "case_3", ""):
                (tree.parent / "store" / place).rmdir()
    assert passed_over.counts() == {"unreadable_folders_left_out": 1}


def test_a_series_of_linked_slices_is_found(tree: Path) -> None:
    paths = save_slices(tree.parent / "store" / "s", chest(), [5.0 + 3 * number for number in range(20)])
    (tree / "s").mkdir()
    for path in paths:
        (tree / "s" / path.name).symlink_to(path)
    found = find_scans(tree)
    assert names(found) == ["case_1/ct.nii.gz", "s"] and found.passed_over.counts() == {}
