from __future__ import annotations

import multiprocessing
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from arrow_builders import GEOMETRY, row_batch, volume, write_arrow

from mg3d.datasets.arrow_files import find_arrow_files
from mg3d.datasets.arrow_schema import FIELDS, check_schema, make_schema, row_checksum
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.errors import DataError

SCHEMA = make_schema(geometry=GEOMETRY)


def rewrite(path: Path, change: Any, *, schema: pa.Schema | None = None) -> Path:
    """Write one packed row whose batch was changed by a function."""
    batch = change(row_batch(SCHEMA, 0))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema or batch.schema) as writer:
        writer.write_batch(batch)
    return path


def set_value(name: str, value: Any) -> Any:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = [pa.array([value], f.type) if f.name == name else batch.column(f.name) for f in SCHEMA]
        return pa.record_batch(columns, schema=SCHEMA)

    return change


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    table = ArrowTable([write_arrow(tmp_path / "a.arrow", 3)])
    assert len(table) == 3 and table.layout == "mg3d"
    assert table.metadata["mg3d.axis_order"] == "DHW=LPS(z,y,x)"
    row = table.row(1)
    np.testing.assert_array_equal(row["image"], volume(1))
    assert row["image"].dtype == np.dtype("<i2") and not row["image"].flags.writeable
    assert row["image_id"] == "scan_1" and row["labels"] == [1] * 18 and row["spacing_mm"] == [1.5, 0.75, 0.75]
    assert row["findings_sen"] == ["The lungs are clear, ", "no nodule. ", "The heart is lungs."]
    assert table.column("patient_id") == ["patient_0", "patient_0", "patient_1"]
    with pytest.raises(IndexError):
        table.row(3)
    with pytest.raises(DataError, match="columns: image, image_shape"):
        table.column("pixels")


def test_image_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    table = ArrowTable([write_arrow(tmp_path / "a.arrow", 2)])
    before = pa.total_allocated_bytes()
    images = [table.row(i)["image"] for i in (0, 1)]
    assert pa.total_allocated_bytes() - before < images[0].nbytes
    assert not any(image.flags.owndata for image in images)


def test_grey_rows_and_own_caption(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", 1, image=volume(5, dtype="uint8"), caption="whole text", labels=[])
    row = ArrowTable([path]).row(0)
    np.testing.assert_array_equal(row["image"], volume(5, dtype="uint8"))
    assert row["caption"] == ["whole text"] and row["labels"] == []


def test_shards_are_one_table_and_survive_pickling(tmp_path: Path) -> None:
    for number in range(3):
        write_arrow(tmp_path / f"clm_ct_rate_train-{number:05d}-of-00003.arrow", 2, first=2 * number)
    table = ArrowTable(find_arrow_files(tmp_path, "clm_ct_rate", "train"))
    table.row(0)
    copy = pickle.loads(pickle.dumps(table))
    assert [copy.row(i)["image_id"] for i in range(6)] == [f"scan_{i}" for i in range(6)]


def read_ids(table: ArrowTable, indices: list[int]) -> list[str]:
    return [table.row(i)["image_id"] for i in indices]


def test_forked_processes_open_their_own_maps(tmp_path: Path) -> None:
    table = ArrowTable([write_arrow(tmp_path / "a.arrow", 4)])
    table.row(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(read_ids, [(table, [0, 1]), (table, [2, 3])])
    assert found == [["scan_0", "scan_1"], ["scan_2", "scan_3"]]


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    paths = [write_arrow(tmp_path / f"{number}.arrow", 1, first=number) for number in range(80)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, hard))
    try:
        table = ArrowTable(paths)
        assert [table.row(i)["image_id"] for i in range(80)] == [f"scan_{i}" for i in range(80)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, part: float) -> None:
    path = write_arrow(tmp_path / "a.arrow", 3)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(DataError, match=r"a\.arrow") as caught:
        ArrowTable([path])
    assert caught.value.remedy


def test_stream_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(row_batch(SCHEMA, 0))
    with pytest.raises(DataError, match="perhaps an Arrow stream"):
        ArrowTable([path])
    path.write_text("<html>not found</html>" * 10)
    with pytest.raises(DataError, match="no Arrow file"):
        ArrowTable([path])


def test_every_flipped_bit_of_a_row_is_found(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", 1)
    data = path.read_bytes()
    clean = ArrowTable([path]).row(0)
    rng = np.random.default_rng(0)
    for _ in range(150):
        position, bit = int(rng.integers(len(data))), int(rng.integers(8))
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        path.write_bytes(bytes(damaged))
        try:
            row = ArrowTable([path]).row(0)
        except DataError:
            continue
        # a bit of padding, or of the footer's metadata, changes no value
        np.testing.assert_array_equal(row.pop("image"), clean["image"])
        assert row == {name: value for name, value in clean.items() if name != "image"}


def test_checksum_can_be_left_out(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", 1)
    pixels = volume(0).tobytes()
    position = path.read_bytes().index(pixels)
    data = bytearray(path.read_bytes())
    data[position + 7] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"row 0 \(scan_0\): the checksum does not fit"):
        ArrowTable([path]).row(0)
    assert (ArrowTable([path], verify_crc=False).row(0)["image"] != volume(0)).sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("image_shape", [8, 6, 11]), r"960 bytes, but shape \[8, 6, 11\] of int16 needs 1056"),
        (set_value("image", b"abc"), "3 bytes"),
        (set_value("image_shape", [8, 60]), "not three positive sizes"),
        (set_value("image_shape", [-8, -6, 10]), "not three positive sizes"),
        (set_value("image_dtype", "float32"), "image_dtype 'float32'"),
        (set_value("image", None), "column image is null"),
        (set_value("labels", None), "column labels is null"),
        (set_value("image_id", "other"), "checksum"),
        (set_value("findings", ["changed"]), "checksum"),
        (set_value("spacing_mm", [1.0, 1.0, 1.0]), "checksum"),
    ],
)
def test_damaged_rows_name_file_and_row(tmp_path: Path, change: Any, message: str) -> None:
    table = ArrowTable([rewrite(tmp_path / "a.arrow", change)])
    with pytest.raises(DataError, match=message) as caught:
        table.row(0)
    assert "a.arrow row 0" in str(caught.value) and caught.value.remedy


def test_missing_columns_wrong_types_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    rewrite(path, lambda batch: batch.drop_columns(["labels"]))
    with pytest.raises(DataError, match="column labels is missing"):
        ArrowTable([path])
    fields = [pa.field("labels", pa.list_(pa.int64())) if f.name == "labels" else f for f in FIELDS]
    rewrite(path, lambda batch: batch.cast(pa.schema(fields, metadata=SCHEMA.metadata)))
    with pytest.raises(DataError, match="column labels has type list<item: int64>, expected list<item: int8>"):
        ArrowTable([path])
    newer = SCHEMA.with_metadata(SCHEMA.metadata | {b"mg3d.format_version": b"2"})
    rewrite(path, lambda batch: batch.replace_schema_metadata(newer.metadata))
    with pytest.raises(DataError, match="format version 2"):
        ArrowTable([path])
    rewrite(path, lambda batch: batch.replace_schema_metadata(SCHEMA.metadata | {b"mg3d.axis_order": b"DHW=RAS"}))
    with pytest.raises(DataError, match="axis order DHW=RAS"):
        ArrowTable([path])
    rewrite(path, lambda batch: batch.replace_schema_metadata({b"mg3d.format_version": b"1"}))
    with pytest.raises(DataError, match=r"mg3d\.geometry"):
        ArrowTable([path])


def test_no_rows_two_rows_in_a_batch_and_mixed_layouts(tmp_path: Path) -> None:
    empty = write_arrow(tmp_path / "empty.arrow", 0)
    with pytest.raises(DataError, match="holds no rows"):
        ArrowTable([empty])
    two = pa.Table.from_batches([row_batch(SCHEMA, 0), row_batch(SCHEMA, 1)]).combine_chunks()
    path = tmp_path / "two.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(two)
    with pytest.raises(DataError, match="2 rows instead of one"):
        ArrowTable([path]).row(0)
    other = write_arrow(tmp_path / "b.arrow", 1, schema=make_schema(geometry={**GEOMETRY, "store": "native"}))
    good = write_arrow(tmp_path / "a.arrow", 1)
    with pytest.raises(DataError, match="other metadata"):
        ArrowTable([good, other])


def test_missing_files_and_shards_say_what_was_expected(tmp_path: Path) -> None:
    write_arrow(tmp_path / "clm_chest_ctrg_train.arrow", 1)
    with pytest.raises(DataError, match=r"expected clm_ct_rate_train\.arrow .* found clm_chest_ctrg_train\.arrow"):
        find_arrow_files(tmp_path, "clm_ct_rate", "train")
    with pytest.raises(DataError, match="no such folder"):
        find_arrow_files(tmp_path / "nowhere", "clm_ct_rate", "train")
    with pytest.raises(DataError, match="no such file"):
        ArrowTable([tmp_path / "gone.arrow"])
    for number in (0, 2):
        write_arrow(tmp_path / f"clm_ct_rate_val-{number:05d}-of-00004.arrow", 1)
    with pytest.raises(DataError, match=r"clm_ct_rate_val-00001-of-00004\.arrow, clm_ct_rate_val-00003-of-00004"):
        find_arrow_files(tmp_path, "clm_ct_rate", "val")
    write_arrow(tmp_path / "clm_ct_rate_val.arrow", 1)
    with pytest.raises(DataError, match="both"):
        find_arrow_files(tmp_path, "clm_ct_rate", "val")


def test_published_types_are_recognised() -> None:
    lists = pa.list_(pa.string())
    names = ("caption", "findings", "impression", "findings_sen", "impression_sen")
    fields = [pa.field("image_id", pa.large_string()), *(pa.field(n, lists) for n in names)]
    published = pa.schema([*fields, pa.field("split", pa.large_string())])
    assert check_schema(published, path="x") == "published"
    assert check_schema(SCHEMA, path="x") == "mg3d"
    with pytest.raises(DataError, match="column findings_sen is missing"):
        check_schema(published.remove(published.get_field_index("findings_sen")), path="x")
    with pytest.raises(DataError, match="column split has type int64"):
        check_schema(pa.schema([*fields, pa.field("split", pa.int64())]), path="x")


def test_rows_that_do_not_fit_the_schema_are_refused_when_packing() -> None:
    with pytest.raises(ValueError, match="float32"):
        row_batch(SCHEMA, 0, image=volume(0).astype(np.float32))
    with pytest.raises(ValueError, match="split"):
        row_batch(SCHEMA, 0, split="training")
    with pytest.raises(ValueError, match="spacing_mm"):
        row_batch(SCHEMA, 0, spacing_mm=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="labels"):
        row_batch(SCHEMA, 0, labels=[2])


def test_row_checksum_covers_every_column() -> None:
    row = row_batch(SCHEMA, 0).to_pylist()[0]
    assert row_checksum(row["image"], row) == row["row_crc32"]
    for name in row:
        if name not in ("image", "row_crc32"):
            assert row_checksum(row["image"], {**row, name: "changed"}) != row["row_crc32"]
    assert row_checksum(row["image"][:-1] + b"\xff", row) != row["row_crc32"]
