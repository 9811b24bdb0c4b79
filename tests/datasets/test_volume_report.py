from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from arrow_builders import SHAPE_DHW, tokenizer, volume, write_arrow
from PIL import Image

from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.transforms import create_transform
from mg3d.datasets.volume import ct_rate_online_crop_resize, ctrg_stack, to_unit_range
from mg3d.datasets.volume_report import ConcatReports, SampleIndex, VolumeReportDataset
from mg3d.errors import DataError

TOKENIZER = tokenizer()


def dataset(path: Path, **options: Any) -> VolumeReportDataset:
    options = {"corpus": "clm_ct_rate", "tokenizer": TOKENIZER, "size_dhw": SHAPE_DHW, "max_text_len": 40} | options
    return VolumeReportDataset(ArrowTable([path]), **options)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_arrow(tmp_path / "clm_ct_rate_train.arrow", 6)


def damage_pixels(path: Path, numbers: list[int]) -> None:
    data = bytearray(path.read_bytes())
    for number in numbers:
        data[data.index(volume(number).tobytes()) + 3] ^= 1
    path.write_bytes(bytes(data))


def test_studies_with_one_report_have_one_key_whatever_sentence_is_drawn(tmp_path: Path) -> None:
    same = {"findings": "Lungs clear. No nodule. Heart normal.", "impression": "normal"}
    first = write_arrow(tmp_path / "a.arrow", 2, **same)
    other = write_arrow(tmp_path / "b.arrow", 1, **same | {"impression": "mass"})
    keys = [dataset(first)[SampleIndex(row, epoch)].report_key for row in (0, 1) for epoch in range(4)]
    assert len(set(keys)) == 1 and keys[0] != dataset(other)[0].report_key and 0 <= keys[0] < 2**63


def test_sample_holds_the_row(packed: Path) -> None:
    sample = dataset(packed)[3]
    assert sample.image.shape == (8, 1, 6, 10) and sample.image.dtype == torch.float32
    np.testing.assert_array_equal(sample.image[:, 0].numpy(), to_unit_range(volume(3)))
    assert (sample.index, sample.image_id, sample.patient_id, sample.corpus) == (
        3,
        "scan_3",
        "patient_1",
        "clm_ct_rate",
    )
    assert sample.labels.tolist() == [1] * 18
    assert sample.report.text == "the lungs are clear, no nodule. the heart is clear. clear normal."
    assert dataset(packed).text(3) == "The lungs are clear, no nodule. The heart is clear. clear normal."


def test_same_sample_for_the_same_seed_epoch_and_row(packed: Path) -> None:
    first, second = dataset(packed, draw_false_image=2), dataset(packed, draw_false_image=2)
    a, b = first[SampleIndex(2, 5)], second[SampleIndex(2, 5)]
    assert a.mlm_seed == b.mlm_seed and a.cell_seed == b.cell_seed and a.mlm_seed != a.cell_seed
    assert torch.equal(a.false_image, b.false_image)
    other = first[SampleIndex(2, 6)]
    assert other.mlm_seed != a.mlm_seed and other.cell_seed != a.cell_seed
    assert dataset(packed, seed=1)[SampleIndex(2, 5)].mlm_seed != a.mlm_seed


def test_fixed_draws_repeat_the_first_epoch(packed: Path) -> None:
    fixed, free = dataset(packed, fixed_draws=True), dataset(packed)
    assert fixed[SampleIndex(1, 5)].cell_seed == fixed[SampleIndex(1, 0)].cell_seed == free[SampleIndex(1, 0)].cell_seed
    assert free[SampleIndex(1, 5)].cell_seed != free[SampleIndex(1, 0)].cell_seed


def test_false_images_are_other_studies(packed: Path) -> None:
    data = dataset(packed, draw_false_image=3)
    real = [data[row].image for row in range(6)]
    for row in range(6):
        false = data[row].false_image
        assert false.shape == (3, 8, 1, 6, 10)
        sources = [next(i for i, image in enumerate(real) if torch.equal(image, one)) for one in false]
        assert len(set(sources)) == 3 and row not in sources
    with pytest.raises(DataError, match="6 rows of clm_ct_rate cannot give 6"):
        dataset(packed, draw_false_image=6)


def test_image_only_and_missing_words_have_no_text(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", 2)
    assert not dataset(path, image_only=True)[0].report.has_text
    path = write_arrow(tmp_path / "b.arrow", 1, findings="nan", impression="", findings_sen=["nan"], impression_sen=[])
    sample = dataset(path)[0]
    assert not sample.report.has_text and TOKENIZER.convert_tokens_to_ids("[UNK]") not in sample.report.input_ids


def test_labels_unknown_when_the_corpus_has_none(tmp_path: Path) -> None:
    assert dataset(write_arrow(tmp_path / "a.arrow", 2, labels=[]))[0].labels.tolist() == [-1] * 18


def test_other_sizes_are_resized(packed: Path) -> None:
    assert dataset(packed, size_dhw=(4, 4, 4))[0].image.shape == (4, 1, 4, 4)


def test_bad_rows_raise_or_are_replaced_in_a_fixed_way(packed: Path) -> None:
    damage_pixels(packed, [1, 4])
    with pytest.raises(DataError, match=r"row 4 \(scan_4\): the checksum"):
        dataset(packed)[4]
    samples = [dataset(packed, on_bad_sample="skip", seed=s)[SampleIndex(4, e)] for s, e in ((0, 0), (0, 9), (0, 0))]
    assert len({sample.index for sample in samples}) == 1
    for sample in samples:
        assert sample.index not in (1, 4)
        assert sample.bad[0].row == 4 and "scan_4" in sample.bad[0].reason
    assert dataset(packed, on_bad_sample="skip")[0].bad == ()


def test_no_endless_search_when_everything_is_bad(packed: Path) -> None:
    damage_pixels(packed, list(range(6)))
    with pytest.raises(DataError, match="6 rows in a row cannot be read"):
        dataset(packed, on_bad_sample="skip")[0]


def test_transforms_by_key(packed: Path) -> None:
    augmented = dataset(packed, transform_keys=["volume_resizedcrop"])
    a, b, c = augmented[SampleIndex(0, 0)], augmented[SampleIndex(0, 0)], augmented[SampleIndex(0, 1)]
    assert torch.equal(a.image, b.image) and not torch.equal(a.image, c.image)
    assert a.image.shape == (8, 1, 6, 10) and 0 <= a.image.min() and a.image.max() <= 1
    for keys, message in (
        (["clip_resizedcrop"], "refused"),
        (["clip_randaug"], "refused"),
        (["x"], "unknown"),
        ([], "one"),
    ):
        with pytest.raises(ValueError, match=message):
            create_transform(keys, SHAPE_DHW)


def published_table(path: Path, rows: list[dict[str, Any]], *, images: bool) -> Path:
    lists = pa.list_(pa.string())
    fields = [pa.field("image", pa.list_(pa.binary()))] if images else []
    fields += [pa.field(n, lists) for n in ("caption", "findings", "impression", "findings_sen", "impression_sen")]
    schema = pa.schema([*fields, pa.field("image_id", pa.large_string()), pa.field("split", pa.string())])
    text = {n: ["Clear lungs."] for n in ("caption", "findings", "impression", "findings_sen", "impression_sen")}
    table = pa.Table.from_pylist([{**text, "split": "train", **row} for row in rows], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    return path


def test_published_path_rows_read_the_npz(tmp_path: Path) -> None:
    scan = np.random.default_rng(0).uniform(-1, 1, (10, 12, 11)).astype(np.float32)
    root = tmp_path / "npz"
    for folder, name in (("train_1/train_1a", "train_1_a_1.npz"), ("train_2/train_2a", "train_2_a_1.nii.gz.npz")):
        (root / folder).mkdir(parents=True)
        np.savez(root / folder / name, scan)
    ids = [
        "/home/somebody/CT-RATE/x/train_1/train_1a/train_1_a_1.npz",
        "train_1/train_1a/train_1_a_1.npz",
        "train_2/train_2a/train_2_a_1.npz",
        "../npz/train_1/train_1a/train_1_a_1.npz",
        "train_3/train_3a/train_3_a_1.npz",
    ]
    path = published_table(tmp_path / "a.arrow", [{"image_id": i} for i in ids], images=False)
    data = dataset(path, image_root=root, size_dhw=(16, 8, 8))
    expected = ct_rate_online_crop_resize(scan, size=(16, 8, 8))
    for row in range(3):
        np.testing.assert_allclose(data[row].image.numpy(), expected, atol=1e-6)
    assert data[0].labels.tolist() == [-1] * 18 and data[0].report.text == "clear lungs. clear lungs."
    with pytest.raises(DataError, match="leaves the image root"):
        data[3]
    with pytest.raises(DataError, match=r"no \.npz file below"):
        data[4]
    with pytest.raises(DataError, match="set image_root"):
        dataset(path)[0]
    (root / "train_1/train_1a/train_1_a_1.npz").write_bytes(b"PK broken")
    with pytest.raises(DataError, match=r"train_1_a_1\.npz.*cannot be read"):
        data[1]


def test_published_path_rows_never_leave_the_root_through_links(tmp_path: Path) -> None:
    np.savez(tmp_path / "secret.npz", np.zeros((4, 4, 4), dtype=np.float32))
    root = tmp_path / "npz"
    root.mkdir()
    (root / "link.npz").symlink_to(tmp_path / "secret.npz")
    path = published_table(tmp_path / "a.arrow", [{"image_id": "link.npz"}], images=False)
    with pytest.raises(DataError, match=r"no \.npz file below"):
        dataset(path, image_root=root)[0]


def test_published_slice_rows_are_decoded(tmp_path: Path) -> None:
    slices = [np.full((40, 50), 10 * k, dtype=np.uint8) for k in range(20)]
    encoded = []
    for grey in slices:
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    rows = [{"image_id": "Chest/1", "image": encoded}, {"image_id": "Chest/2", "image": [b"no image"] * 20}]
    data = dataset(published_table(tmp_path / "a.arrow", rows, images=True), size_dhw=(16, 8, 8))
    np.testing.assert_allclose(data[0].image.numpy(), ctrg_stack(slices, (16, 8, 8)), atol=1e-6)
    assert data[0].image[0].mean() > data[0].image[-1].mean()  # the order is reversed
    with pytest.raises(DataError, match="case Chest/2: slice 0 is no picture"):
        data[1]


def test_concatenation_numbers_rows_through(tmp_path: Path, packed: Path) -> None:
    other = write_arrow(tmp_path / "clm_chest_ctrg_train.arrow", 3, first=50, corpus="clm_chest_ctrg")
    parts = [dataset(packed), dataset(other, corpus="clm_chest_ctrg", first_row=6)]
    both = ConcatReports(parts)
    assert len(both) == 9
    assert [(both[i].index, both[i].image_id, both[i].corpus) for i in (5, 6)] == [
        (5, "scan_5", "clm_ct_rate"),
        (6, "scan_50", "clm_chest_ctrg"),
    ]
    assert both[6].mlm_seed != parts[0][0].mlm_seed
    assert both.text(6).startswith("No effusion")
    with pytest.raises(IndexError):
        both[9]
    with pytest.raises(ValueError, match="starts at row 0, expected 6"):
        ConcatReports([dataset(packed), dataset(other)])
