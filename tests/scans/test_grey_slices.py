"""One way from a slice picture to 8-bit grey values: what has other bits is refused by name, by every reader."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepro_builders import SMALL, ctrg_tree

from mg3d.datasets.published_pixels import decode_slices
from mg3d.errors import DataError
from mg3d.scans.ctrg import read_ctrg
from mg3d.scans.grey_slices import SliceFiles, grey_pixels
from mg3d.scans.slice_series import find_series, series_to_array
from prepro.readers.ctrg import CtrgReader

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, row: bytes) -> bytes:
    """A PNG of 16 equal rows, of a kind that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 16, 16, depth, colour, 0, 0, 0)
    body = zlib.compress((b"\0" + row) * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def transparent() -> Image.Image:
    image = Image.fromarray(GREY).convert("LA")
    image.putpixel((3, 4), (90, 0))
    return image


SIXTEEN = saved(Image.fromarray(GREY.astype(np.uint16) * 257))
REFUSED = {
    "16 bits": (SIXTEEN, "16 bits"),
    "12 of 16 bits": (saved(Image.fromarray(GREY.astype(np.uint16) * 16)), "16 bits"),
    "16-bit TIFF": (saved(Image.fromarray(GREY.astype(np.uint16)), "TIFF"), "16 bits"),
    "big-endian TIFF": (saved(Image.frombytes("I;16B", (16, 16), bytes(512)), "TIFF"), "16 bits"),
    "32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "32 bits"),
    "real numbers": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "32 bits"),
    "colour of 16 bits": (png(16, 2, bytes(96)), "16 bits"),
    "grey and alpha of 16 bits": (png(16, 4, b"\xff" * 64), "16 bits"),
    "one bit": (saved(Image.fromarray(GREY).convert("1")), "1 bit"),
    "CMYK": (saved(Image.fromarray(GREY).convert("CMYK"), "JPEG"), "CMYK"),
    "LAB": (saved(Image.fromarray(GREY).convert("RGB").convert("LAB"), "TIFF"), "LAB"),
    "transparent": (saved(transparent()), "transparent"),
    "two pictures": (
        saved(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]),
        "2 pictures",
    ),
    "too large": (
        png(8, 0, bytes(16)).replace(struct.pack(">II", 16, 16), struct.pack(">II", 60_000, 60_000)),
        "slice",
    ),
    "cut short": (saved(Image.fromarray(GREY))[:50], "slice"),
    "no picture": (b"<html>", "no picture"),
    "empty": (b"", "no picture"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_picture_without_8_bit_grey_values_is_refused(kind: str) -> None:
    content, words = REFUSED[kind]
    with pytest.raises(DataError, match=words) as caught:
        grey_pixels(content, path="7.png", case_id="4")
    assert (caught.value.path, caught.value.case_id) == ("7.png", "4") and caught.value.remedy


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_picture_is_refused_or_decoded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for content in (saved(Image.fromarray(GREY)), saved(Image.fromarray(GREY), "JPEG"), saved(transparent(), "TIFF")):
        damaged = bytearray(content)
        for place in rng.integers(0, len(damaged), 4):
            damaged[place] = rng.integers(256)
        try:
            assert grey_pixels(bytes(damaged), path="7.png").dtype == np.uint8
        except DataError as problem:
            assert problem.path == "7.png"


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "LA", "RGBA"])
def test_8_bit_grey_keeps_its_values_in_every_mode(mode: str) -> None:
    palette = Image.fromarray(GREY)
    if mode == "P":
        palette = Image.frombytes("P", (16, 16), GREY.tobytes())
        palette.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
    np.testing.assert_array_equal(grey_pixels(saved(palette.convert(mode))), GREY)
    four_bits = grey_pixels(png(4, 0, bytes(range(0, 128, 16))))
    assert four_bits.max() == 7 * 17


def _folder(root: Path, content: bytes) -> Callable[[], object]:
    for number in range(20):
        (root / f"{number}.png").write_bytes(content if number == 9 else saved(Image.fromarray(GREY)))
    return lambda: read_ctrg(root, (16, 8, 8))


def _zip(root: Path, content: bytes) -> Callable[[], object]:
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"NCP/1/2/{number}.png", content if number == 2 else saved(Image.fromarray(GREY)))
    return lambda: series_to_array(find_series(root)[0], 4, 8)


def _published_row(root: Path, content: bytes) -> Callable[[], object]:
    return lambda: decode_slices([saved(Image.fromarray(GREY))] * 9 + [content] * 9, "4", (8, 8, 8))


def _download(root: Path, content: bytes) -> Callable[[], object]:
    annotation = ctrg_tree(root, train=1, test=1)
    (root / "Chest" / "0" / "10.png").write_bytes(content)
    reader = CtrgReader(root, annotation, SMALL)
    return lambda: reader.load(reader.find_cases().cases[0])


@pytest.mark.parametrize("place", [_folder, _zip, _published_row, _download])
def test_every_reader_of_slices_refuses_16_bits_by_name(
    tmp_path: Path, place: Callable[[Path, bytes], Callable[[], object]]
) -> None:
    read = place(tmp_path, SIXTEEN)
    with pytest.raises(DataError, match="16 bits") as caught:
        read()
    assert caught.value.path or caught.value.case_id
    assert "8-bit grey" in caught.value.remedy


def test_slices_of_another_size_are_refused(tmp_path: Path) -> None:
    for number, size in enumerate((16, 16, 8)):
        (tmp_path / f"{number}.png").write_bytes(saved(Image.fromarray(GREY[:size])))
    with pytest.raises(DataError, match="shape"):
        list(SliceFiles(tuple(sorted(tmp_path.iterdir()))))
