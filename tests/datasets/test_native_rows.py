"""Compressed rows of whole volumes: read like any other, damage found, cropped and resized for the model."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from arrow_builders import GEOMETRY, tokenizer, volume, write_arrow

from mg3d.datasets.arrow_schema import make_schema
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.volume import centre_crop, resize_trilinear, to_unit_range
from mg3d.datasets.volume_report import VolumeReportDataset
from mg3d.errors import DataError

FRACTIONS = (0.88, 0.65625, 0.875)
SCHEMA = make_schema(geometry={**GEOMETRY, "crop_fractions": FRACTIONS, "store": "native"})
SHAPE = (20, 24, 16)


def smooth(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Voxels that compress, so that the file holds them compressed and not as they are."""
    return (volume(1, shape) // 64 * 16).astype(np.int16)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return write_arrow(tmp_path / "native.arrow", 3, schema=SCHEMA, compression="zstd", image=smooth())


def dataset(path: Path, size_dhw: tuple[int, int, int], **options: object) -> VolumeReportDataset:
    return VolumeReportDataset(
        ArrowTable([path]), corpus="clm_ct_rate", tokenizer=tokenizer(), size_dhw=size_dhw, max_text_len=40, **options
    )


def test_compressed_rows_read_like_plain_ones(native: Path, tmp_path: Path) -> None:
    plain = write_arrow(tmp_path / "plain.arrow", 3, schema=SCHEMA, image=smooth())
    assert native.stat().st_size < 0.8 * plain.stat().st_size
    tables = pickle.loads(pickle.dumps(ArrowTable([native]))), ArrowTable([plain])
    for number in range(3):
        found, wanted = (table.row(number) for table in tables)
        np.testing.assert_array_equal(found.pop("image"), smooth())
        wanted.pop("image")
        assert found == wanted
    assert tables[0].column("findings") == tables[1].column("findings")
    assert not tables[0].row(0)["image"].flags.writeable


def test_volumes_outlive_their_table(native: Path) -> None:
    table = ArrowTable([native])
    image = table.row(1)["image"]
    table.release()
    del table
    np.testing.assert_array_equal(image, smooth())


def test_flipped_bits_never_change_a_volume_in_silence(native: Path) -> None:
    data = native.read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for position in rng.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        native.write_bytes(bytes(damaged))
        try:
            rows = [ArrowTable([native]).row(number) for number in range(3)]
        except DataError:
            found += 1
            continue
        assert all(np.array_equal(row["image"], smooth()) for row in rows)
    assert found > 30


@pytest.mark.parametrize("size", [(8, 6, 10), (32, 32, 64), (7, 5, 3)])
def test_any_model_size_is_cut_from_the_middle(native: Path, size: tuple[int, int, int]) -> None:
    image = dataset(native, size)[0].image
    assert image.shape == (size[0], 1, *size[1:])
    wanted = resize_trilinear(centre_crop(to_unit_range(smooth()), FRACTIONS), size)
    np.testing.assert_array_equal(image[:, 0].numpy(), wanted)
    false = dataset(native, size, draw_false_image=1)[0].false_image
    assert false is not None and np.array_equal(false[0, :, 0].numpy(), wanted)


def test_a_volume_too_thin_for_the_crop_is_a_bad_sample(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "thin.arrow", 2, schema=SCHEMA, compression="zstd", image=smooth((1, 24, 16)))
    with pytest.raises(DataError, match="leave nothing"):
        dataset(path, (8, 6, 10))[0]
