"""The verifier on packed files: every fault is found and named, a clean set is clean."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prepro_builders import ct_rate_tree
from verify_builders import SCHEMA, codes, packed_rows, resign, run_verify, write_rows

from mg3d.datasets.arrow_schema import FIELDS, make_schema
from prepro.prepro_pretraining_data import main as pack_main
from prepro.verify import main

SIZE = ["--image-size", "8", "6", "8", "--target-spacing", "none"]
SCRIPT = Path(__file__).resolve().parents[2] / "prepro" / "verify.py"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    root = ct_rate_tree(folder / "raw", train=4, valid=2)
    assert pack_main(["ct_rate", "--root", str(root), "--out", str(folder / "out"), *SIZE, "--workers", "1"]) == 0
    return folder / "out"


def copy(packed: Path, to: Path) -> Path:
    to.mkdir()
    for path in packed.iterdir():
        if not path.name.startswith("."):
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_packed_set_is_clean(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(packed), "--strict", "--json", str(tmp_path / "r.json")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["files"], summary["rows"], summary["errors"], summary["warnings"]) == (3, 6, 0, 0)
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["findings"] == []


def test_the_command_runs_from_anywhere_without_torch(packed: Path, tmp_path: Path) -> None:
    probe = (
        f"import runpy, sys; sys.argv = ['verify.py', {str(packed)!r}, '--workers', '2']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        f"except SystemExit as end: code = end.code\n"
        f"sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exit"] == 0


def test_help_is_light_and_bad_arguments_exit_two(tmp_path: Path) -> None:
    probe = (
        f"import runpy, sys; sys.argv = ['verify.py', *sys.argv[1:]]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        f"except SystemExit as end: code = end.code or 0\n"
        f"sys.exit(code + 10 * any(name in sys.modules for name in ('torch', 'numpy', 'pyarrow')))"
    )
    for words, expected in ((["--help"], 0), ([], 2), (["x", "--workers", "-1"], 2)):
        done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == expected, done.stderr
        assert len(done.stderr.splitlines()) <= 5


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_off_says_what_was_expected(packed: Path, tmp_path: Path, part: float) -> None:
    path = copy(packed, tmp_path / "out") / "clm_ct_rate_train.arrow"
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    code, findings, _ = run_verify(path)
    assert code == 2 and codes(findings) == {"file_unreadable"}
    assert f"the manifest says {len(data):,} bytes and 3 rows" in findings[0]["message"]
    assert findings[0]["file"] == str(path) and "pack the file again" in findings[0]["remedy"]


def test_streams_foreign_files_and_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clm_ct_rate_train.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(packed_rows(1)[0])
    assert "perhaps an Arrow stream" in run_verify(path)[1][-1]["message"]
    path.write_text("<html>not found</html>")
    assert "no Arrow file" in run_verify(path)[1][-1]["message"]
    write_rows(path, [batch.drop_columns(["labels"]) for batch in packed_rows(2)], manifest=False)
    assert "column labels is missing" in run_verify(path)[1][-1]["message"]
    fields = [pa.field("labels", pa.list_(pa.int64())) if f.name == "labels" else f for f in FIELDS]
    wide = pa.schema(fields, metadata=SCHEMA.metadata)
    write_rows(path, [batch.cast(wide) for batch in packed_rows(2)], manifest=False)
    assert "column labels has type list<item: int64>" in run_verify(path)[1][-1]["message"]


def test_no_rows_is_an_error_unless_the_manifest_agrees(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "clm_ct_rate_val.arrow", [], manifest=False)
    code, findings, _ = run_verify(path)
    assert code == 2 and "no_rows" in codes(findings)
    write_rows(path, [])
    code, findings, _ = run_verify(path)
    assert code == 0 and codes(findings) == {"no_rows_expected"}


def test_forty_of_forty_flipped_bits_are_found(packed: Path, tmp_path: Path) -> None:
    path = copy(packed, tmp_path / "out") / "clm_ct_rate_train.arrow"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [int(place) for place in rng.integers(len(data), size=36)]
    places += [6, len(data) - 1, len(data) - 8, len(data) - 40]  # padding, magic, footer
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        code, findings, _ = run_verify(path)
        assert code == 2, place
        assert codes(findings) & {"manifest_differs", "file_unreadable"}, place


def test_a_flipped_voxel_names_its_row(packed: Path, tmp_path: Path) -> None:
    path = copy(packed, tmp_path / "out") / "clm_ct_rate_train.arrow"
    pixels = pa.ipc.open_file(str(path)).get_batch(1).column("image")[0].as_py()
    data = bytearray(path.read_bytes())
    data[bytes(data).index(pixels) + 5] ^= 16
    path.write_bytes(bytes(data))
    _, findings, _ = run_verify(path)
    (row,) = [item for item in findings if item["code"] == "row_damaged"]
    assert (row["row"], row["file"]) == (1, str(path)) and row["case"].startswith("train_")
    assert "checksum" in row["message"] and "copy it again" in row["remedy"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"image_shape": [8, 6, 11]}, "row_damaged", "needs 1056"),
        ({"image": b"abc"}, "row_damaged", "3 bytes"),
        ({"image_dtype": "float32"}, "row_damaged", "float32"),
        ({"findings": None}, "row_damaged", "null"),
        ({"image_id": "other"}, "row_damaged", "checksum"),
    ],
)
def test_damaged_rows_are_listed_and_the_others_go_on(
    tmp_path: Path, changes: dict[str, Any], code: str, words: str
) -> None:
    batches = packed_rows(3)
    batches[1] = resign(batches[1], changes, sign=False)
    exit_code, findings, summary = run_verify(write_rows(tmp_path / "clm_ct_rate_train.arrow", batches))
    assert exit_code == 2 and summary["rows"] == 3
    (bad,) = [item for item in findings if item["severity"] == "error"]
    assert (bad["code"], bad["row"]) == (code, 1) and words in bad["message"] and bad["remedy"]


AIR = np.full((8, 6, 10), -1000, np.int16)
HALF = AIR.copy()
HALF[0] = np.arange(60, dtype=np.int16).reshape(6, 10)


@pytest.mark.parametrize(
    ("changes", "code", "severity"),
    [
        ({"image": AIR.tobytes()}, "constant_volume", "warning"),
        ({"image": HALF.tobytes()}, "empty_slices", "warning"),
        ({"image": (HALF + 5000).tobytes()}, "outside_window", "warning"),
        ({"image": np.arange(480, dtype=np.int16).tobytes()}, "implausible_hu", "warning"),
        ({"image": AIR[:4].tobytes(), "image_shape": [4, 6, 10]}, "shape_differs", "error"),
        ({"image": bytes(range(240)) * 2, "image_dtype": "uint8"}, "type_differs", "error"),
        ({"spacing_mm": [0.0, 1.0, 1.0]}, "spacing_invalid", "error"),
        ({"spacing_mm": [float("nan"), 1.0, 1.0]}, "spacing_invalid", "error"),
        ({"spacing_mm": [0.015625, 0.015625, 0.015625]}, "spacing_odd", "warning"),
        ({"labels": [2] + [0] * 17}, "labels_invalid", "error"),
        ({"labels": [0] * 17}, "labels_invalid", "error"),
        ({"findings": ["nan"], "findings_sen": ["nan"]}, "text_missing_word", "error"),
        ({"findings": ["a text here", "another"]}, "text_invalid", "error"),
        ({"findings": [None]}, "text_invalid", "error"),
        ({"caption": [""], "findings": [""], "impression": [""]}, "empty_report", "warning"),
        ({"findings_sen": ["The lungs are clear, "]}, "fragments_differ", "warning"),
        ({"caption": [""]}, "caption_differs", "warning"),
        ({"patient_id": " "}, "id_missing", "error"),
        ({"split": "val"}, "split_differs", "error"),
        ({"corpus": "clm_own"}, "split_differs", "error"),
    ],
)
def test_odd_rows_with_right_checksums_are_found(
    tmp_path: Path, changes: dict[str, Any], code: str, severity: str
) -> None:
    batches = packed_rows(2)
    batches[1] = resign(batches[1], changes)
    exit_code, findings, summary = run_verify(write_rows(tmp_path / "clm_ct_rate_train.arrow", batches))
    found = {item["code"]: item for item in findings}
    assert found[code]["severity"] == severity and found[code]["row"] == 1 and found[code]["case"] == "scan_1"
    assert exit_code == (2 if severity == "error" else 0)
    assert summary["empty_reports"] == (code == "empty_report")


def test_fragments_of_any_rule_cover_the_text(tmp_path: Path) -> None:
    batches = packed_rows(1)
    whole = batches[0].to_pylist()[0]["findings"][0]
    sentences = [f"{part}." for part in whole.rstrip(".").split(". ")]
    batches[0] = resign(batches[0], {"findings_sen": sentences})
    assert run_verify(write_rows(tmp_path / "clm_ct_rate_train.arrow", batches))[1] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"rows": 4}, "counts 4 rows and lists 3"),
        (lambda m: m | {"bytes": m["bytes"] + 1}, "cut off"),
        (lambda m: m | {"sha256": "0" * 64}, "bytes were changed"),
        (lambda m: m | {"file": "other.arrow"}, "is of other.arrow"),
        (lambda m: {key: m[key] for key in m if key != "sha256"}, "lacks sha256"),
        (lambda m: m | {"cases": m["cases"][::-1]}, "the manifest says 'scan_2'"),
        (lambda m: [m], "not readable"),
    ],
)
def test_manifests_that_disagree(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    path = write_rows(tmp_path / "clm_ct_rate_train.arrow", packed_rows(3))
    manifest = path.with_suffix(".manifest.json")
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text(encoding="utf-8")))))
    code, findings, _ = run_verify(path)
    assert code == 2 and any(words in item["message"] for item in findings)


def test_without_a_manifest_it_warns_and_strict_makes_it_fail(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "clm_ct_rate_train.arrow", packed_rows(2), manifest=False)
    code, findings, _ = run_verify(path)
    assert code == 0 and codes(findings) == {"manifest_missing"}
    assert run_verify(path, "--strict")[0] == 1


def leaking(folder: Path, protocol: str, same: str) -> Path:
    train, test = packed_rows(2), packed_rows(2, first=10, split="test")
    known = train[0].to_pylist()[0]
    values = {"patient": {"patient_id": known["patient_id"]}, "content": {"image": known["image"]}}
    values["study"] = {"image_id": "train_1_a_2", "patient_id": "someone"}
    train[0] = resign(train[0], {"image_id": "train_1_a_1"})
    test[0] = resign(test[0], values[same])
    for name, batches in (("train", train), ("test", test)):
        write_rows(folder / f"clm_ct_rate_{name}.arrow", batches, protocol=protocol)
    return folder


@pytest.mark.parametrize("same", ["patient", "study", "content"])
def test_what_two_splits_share_is_an_error_in_clean_and_a_note_in_reference(tmp_path: Path, same: str) -> None:
    for protocol, expected, severity in (("clean", 2, "error"), ("reference", 0, "note")):
        code, findings, _ = run_verify(leaking(tmp_path / protocol, protocol, same))
        (item,) = [item for item in findings if item["code"].endswith("_in_two_splits")]
        assert (code, item["code"], item["severity"]) == (expected, f"{same}_in_two_splits", severity)
        assert "train_1_a_1 (train)" in item["message"] and "(test)" in item["message"]


def test_duplicates_across_shards_and_missing_shards(tmp_path: Path) -> None:
    for number in (0, 2):
        write_rows(tmp_path / f"clm_ct_rate_train-{number:05d}-of-00003.arrow", packed_rows(2))
    code, findings, _ = run_verify(tmp_path)
    assert code == 2 and {"missing_shard", "missing_split", "duplicate_id"} == codes(findings)
    assert "clm_ct_rate_train-00001-of-00003.arrow" in str(findings)
    twin = resign(packed_rows(1)[0], {"image_id": "twin"})
    write_rows(tmp_path / "b" / "clm_ct_rate_train.arrow", [*packed_rows(1), twin])
    assert run_verify(tmp_path / "b" / "clm_ct_rate_train.arrow")[1][0]["message"] == "twin equals scan_0"


def test_leftovers_lone_manifests_and_other_settings(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        write_rows(tmp_path / f"clm_ct_rate_{split}.arrow", packed_rows(1, split=split, first=number))
    assert run_verify(tmp_path)[1] == []
    (tmp_path / ".clm_ct_rate_train.arrow.partial").write_bytes(b"")
    (tmp_path / "clm_own_train.manifest.json").write_text("{}")
    other = make_schema(geometry={"size": [8, 6, 10], "store": "crop", "target_spacing_mm": None})
    write_rows(tmp_path / "clm_ct_rate_val.arrow", packed_rows(1, split="val", first=1, schema=other))
    code, findings, _ = run_verify(tmp_path)
    assert code == 2 and codes(findings) == {"unfinished_run", "orphan_manifest", "metadata_differs"}


def test_a_folder_with_an_unfinished_run_only(tmp_path: Path) -> None:
    (tmp_path / ".clm_ct_rate_train.arrow.partial").write_bytes(b"ARROW1")
    code, findings, _ = run_verify(tmp_path)
    assert code == 0 and codes(findings) == {"unfinished_run"} and "run the packing command" in findings[0]["remedy"]


def test_published_files_get_the_checks_that_apply(tmp_path: Path) -> None:
    lists = pa.list_(pa.string())
    text = {name: [["No nodule. "], ["nan"], ["No nodule. "]] for name in ("caption", "findings", "findings_sen")}
    columns: dict[str, Any] = {"image_id": ["/a/train_1_a_1.npz", "/a/train_2_a_1.npz", "/a/train_2_a_1.npz"], **text}
    columns |= {"impression": [[""]] * 3, "impression_sen": [[]] * 3, "split": ["train", "train", "val"]}
    types = {name: pa.string() if name in ("image_id", "split") else lists for name in columns}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    path = tmp_path / "clm_ct_rate_train.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    _, findings, summary = run_verify(path)
    wanted = {"published_layout", "manifest_missing", "text_missing_word", "empty_report", "split_differs"}
    assert codes(findings) == wanted | {"duplicate_id"} and summary["rows"] == 3


def test_several_paths_and_nonsense_paths(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("x")
    paths = [packed / "clm_ct_rate_val.arrow", tmp_path / "gone", tmp_path / "empty", tmp_path / "note.txt"]
    code, _, summary = run_verify(*paths)
    assert code == 2 and summary["files"] == 1
    assert summary["kinds"] == {"not_found": 1, "nothing_to_check": 2}


def test_the_text_is_grouped_capped_and_holds_no_report(tmp_path: Path) -> None:
    batches = [resign(batch, {"labels": [7] * 18}) for batch in packed_rows(30)]
    path = write_rows(tmp_path / "clm_ct_rate_train.arrow", batches, manifest=False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(path), "--json", str(tmp_path / "r.json")]) == 2
    text = out.getvalue()
    assert "ERRORS" in text and text.index("ERRORS") < text.index("WARNINGS")
    assert "row 0 scan_0: label 7" in text and "and 20 more" in text and text.count("mend:") == 2
    assert "nodule" not in text + (tmp_path / "r.json").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["findings"]) == 31


def test_a_packing_is_compared_with_its_own_list_of_files(packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path / "out")
    (folder / "clm_ct_rate_val.arrow").unlink()
    (folder / "clm_ct_rate_val.manifest.json").unlink()
    code, findings, _ = run_verify(folder)
    assert code == 2 and "clm_ct_rate_val.arrow is listed and not there" in [item["message"] for item in findings]
    write_rows(folder / "clm_ct_rate_val.arrow", packed_rows(1, split="val"))
    assert "clm_ct_rate_val.arrow is not of this packing" in [item["message"] for item in run_verify(folder)[1]]
    write_rows(folder / "clm_ct_rate_test-00000-of-00001.arrow", packed_rows(1, split="test"))
    messages = [item["message"] for item in run_verify(folder)[1]]
    assert "clm_ct_rate_test-00000-of-00001.arrow is not of this packing" in messages
    (folder / "clm_ct_rate.manifest.json").write_text("{}")
    assert "not the list of a corpus' files" in [item["message"] for item in run_verify(folder)[1]]


def test_native_shards_and_published_splits(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=4, valid=2, reconstructions=2)
    native = ["--store", "native", "--target-spacing", "3", "3", "3", "--rows-per-shard", "3", "--workers", "1"]
    words = ["ct_rate", "--root", str(root), "--out", str(tmp_path / "out"), "--split-protocol", "reference", *native]
    assert pack_main(words) == 0
    code, findings, summary = run_verify(tmp_path / "out", "--strict")
    assert code == 0 and summary["rows"] == 16
    shared = [(item["code"], item["severity"], item["message"]) for item in findings]
    valid = [f"valid_{number}: valid_{number}_a_1 (test) and valid_{number}_a_1 (val)" for number in (1, 2)]
    assert shared == [("patient_in_two_splits", "note", message) for message in valid]
