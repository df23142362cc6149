"""Numbers that Pillow hands on otherwise than viewers show them: few bits, 12 bits, signed, white as zero."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch

from capsight.errors import OptionError
from capsight.pictures import open_image, picture


def png(depth: int, kind: int, width: int, row: bytes, clear: bytes) -> bytes:
    """A PNG of one row with a transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    body = chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def tiff(bits: int, sample_format: int, photometric: int, width: int, row: bytes) -> bytes:
    """A TIFF of one row of grey."""
    values = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1,
              279: len(row), 339: sample_format}  # fmt: skip
    values[273] = 8 + 2 + 12 * len(values) + 4
    head = b"II" + struct.pack("<HIH", 42, 8, len(values))
    tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in values.items())
    return head + tags + struct.pack("<I", 0) + row


def row_of(tmp_path, data: bytes) -> list[int]:
    (tmp_path / "a").write_bytes(data)
    return np.asarray(open_image(tmp_path / "a"))[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("depth", "row", "clear", "wanted"),
    [
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (4, b"\x05\xaf", 5, [0, 255, 170, 255]),
        (8, b"\x00\x55\xaa\xff", 0x55, [0, 255, 170, 255]),
        (1, b"\x50", 0, [255, 255, 255, 255]),
    ],
)
def test_a_transparent_grey_of_few_bits(tmp_path, depth, row, clear, wanted):
    assert row_of(tmp_path, png(depth, 0, 4, row, struct.pack(">H", clear))) == wanted


def test_a_transparent_colour_of_16_bits_cannot_be_told(tmp_path):
    row = np.array([[1000, 2000, 3000], [60000, 50000, 40000]], ">u2").tobytes()
    with pytest.raises(OptionError, match="save it with 8 bits"):
        row_of(tmp_path, png(16, 2, 2, row, struct.pack(">HHH", 3, 7, 11)))


UNSIGNED, SIGNED, FLOAT = 1, 2, 3


@pytest.mark.parametrize(
    ("bits", "kind", "row", "wanted"),
    [
        (16, UNSIGNED, np.array([0, 0x8000, 0xFFFF], "<u2").tobytes(), [0, 128, 255]),
        (16, SIGNED, np.array([0, 0x4000, 0x7FFF], "<i2").tobytes(), [0, 128, 255]),
        (12, UNSIGNED, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0]), [0, 128, 255]),
        (8, UNSIGNED, bytes([0, 128, 255]), [0, 128, 255]),
        (32, FLOAT, np.array([0, 0.5, 1], "<f4").tobytes(), [0, 128, 255]),
    ],
)
@pytest.mark.parametrize("white", [0, 1])
def test_grey_of_a_tiff(tmp_path, bits, kind, row, wanted, white):
    if white == 0 and (bits, kind) in ((16, SIGNED), (12, UNSIGNED)):
        with pytest.raises(OptionError, match="none of"):  # Pillow does not know it
            row_of(tmp_path, tiff(bits, kind, white, 3, row))
        return
    found = row_of(tmp_path, tiff(bits, kind, white, 3, row))
    assert found == (wanted if white else [255 - level for level in wanted])


def test_signed_bytes(tmp_path):
    assert row_of(tmp_path, tiff(8, SIGNED, 1, 2, bytes([0, 64]))) == [0, 128]
    with pytest.raises(OptionError, match="negative"):
        row_of(tmp_path, tiff(8, SIGNED, 1, 2, bytes([0, 200])))
    assert np.asarray(picture(np.array([[0, 0x4000, 0x7FFF]], np.int16)))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("most", [1.0001, 1.5, np.float32(1.0000001)])
def test_floats_that_are_a_bit_too_large_are_no_dark_picture(most):
    with pytest.raises(OptionError, match="clip them to 0-1"):
        picture(np.array([[0.0, 0.5, most]]))


def test_tensors_that_numpy_has_no_type_for():
    values = torch.rand(3, 8, 8).bfloat16()
    assert picture(values).tobytes() == picture(values.float()).tobytes()


@pytest.mark.parametrize("source", ["https://x.org/a.png", "data:image/png;base64,AAAA"])
def test_addresses_are_told_from_files(source):
    with pytest.raises(OptionError, match="is an address"):
        picture(source)


def test_open_files_are_no_tensors():
    with pytest.raises(OptionError, match="BytesIO is no path"):
        picture(io.BytesIO(b"x"))
