"""Nothing that a table, list or archive names is read from outside the data root."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mg3d.errors import DataError
from mg3d.files import write_csv
from mg3d.finetuning.decathlon import listed_splits, read_listing
from mg3d.finetuning.scan_lists import COLUMNS, read_scan_list
from mg3d.paths import confined_path, is_plain_name
from mg3d.phantoms.downstream.ctrg import write_ctrg
from mg3d.scans.geometry import Geometry
from mg3d.scans.slice_series import find_series
from prepro.readers.ctrg import CtrgReader
from prepro.readers.own_data import OwnDataReader

OUTSIDE = [
    "../secret.nii.gz",
    "a/../../secret.nii.gz",
    "{outside}/secret.nii.gz",
    "link/secret.nii.gz",
    "./link/../../secret.nii.gz",
    "linked.nii.gz",
    "..\\secret.nii.gz",
    "link\\secret.nii.gz",
    "C:\\secret.nii.gz",
    "\\\\server\\share\\secret.nii.gz",
    "file\0.nii.gz",
    "~/secret.nii.gz",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with links that lead out of it, and a file outside."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.nii.gz").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path)
    (root / "linked.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    return root


@pytest.mark.parametrize("entry", OUTSIDE)
def test_no_table_and_no_list_reaches_outside(entry: str, root: Path) -> None:
    entry = entry.format(outside=root.parent)
    write_csv(root / "cases.csv", ["volume", "findings"], [[entry, "Lungs are clear today."]])
    found = OwnDataReader(root / "cases.csv", root, Geometry()).find_cases()
    assert found.cases == [] and len(found.exclusions) == 1
    content = {"train": [{"id": 1, "report": "Lungs are clear today.", "result": "", "image_path": entry}], "val": []}
    (root / "annotation.json").write_text(json.dumps({**content, "test": []}))
    packed = CtrgReader(root, root / "annotation.json", Geometry(target_spacing_mm=None)).find_cases()
    assert packed.cases == [] and len(packed.exclusions) == 1
    if not entry.startswith("~"):  # a folder of that name may be below the root
        with pytest.raises(DataError):
            confined_path(root, entry)


@pytest.mark.parametrize("entry", ["../../outside", "/etc", "..\\..\\outside", "link/x"])
def test_the_report_benchmark_refuses_images_outside(entry: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_ctrg(root, studies=12, size=32)
    (root / "link").symlink_to(tmp_path)
    path = root / "annotation.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["train"][0]["image_path"] = [f"{entry}/1.png"]
    path.write_text(json.dumps(content))
    benchmark, config = _ctrg()
    with pytest.raises(DataError, match="leaves the data root"):
        benchmark.splits(config(benchmark, data_root=str(root)))
    (line,) = benchmark.check_data(config(benchmark, data_root=str(root)))
    assert "leaves the data root" in line


def _ctrg() -> tuple[Any, Any]:
    sys.path.insert(0, str(Path(__file__).parent / "downstream"))
    from folders import config, load_folder

    return load_folder("CTRG").BENCHMARK, config


@pytest.mark.parametrize("entry", ["../secret.nii.gz", "/etc/secret.nii.gz", "link/secret.nii.gz"])
def test_a_decathlon_list_names_files_of_the_folder_only(entry: str, root: Path) -> None:
    (root / "d.json").write_text(json.dumps({"training": [{"image": entry, "label": entry}], "validation": []}))
    assert read_listing(root / "d.json").training == (("secret.nii.gz", "secret.nii.gz"),)
    with pytest.raises(DataError):
        listed_splits(root / "d.json", ())


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a\\b", "", ".", "x\0y", "/x"])
def test_names_that_become_file_names_are_plain(name: str, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    row = dict.fromkeys(COLUMNS, "1") | {"target": "0", "patient_id": f"1/{name}"}
    write_csv(tmp_path / "scans.csv", COLUMNS, [row])
    with pytest.raises(DataError, match="row 2"):
        read_scan_list(tmp_path / "scans.csv", ("a", "b"))


def test_plain_names_pass() -> None:
    assert all(map(is_plain_name, ("1", "p1-s2", "..x", "a.b", "ü")))


def test_members_of_an_archive_are_read_in_place_and_never_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with zipfile.ZipFile(root / "CP-1.zip", "w") as archive:
        for name in ("../../out/CP/1/2/1.png", "/abs/CP/1/2/1.png", "CP/1/2/../../../../x.png", "CP/1/2/1.png"):
            archive.writestr(name, b"no picture")
    before = sorted(tmp_path.rglob("*"))
    series = find_series(root)
    assert all(scan.container == root / "CP-1.zip" for scan in series)
    assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(root)
