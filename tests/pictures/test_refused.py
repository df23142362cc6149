"""What cannot be read as one picture is refused in one sentence that names it."""

from __future__ import annotations

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from capsight.errors import OptionError
from capsight.pictures import open_image, picture
from pictures.test_formats import colour, grey


def refused(path, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OptionError) as caught:
            open_image(path)
    said = str(caught.value)
    assert path.name in said
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize("kind", ["gif", "tif", "webp", "png", "avif"])
def test_several_frames(tmp_path, kind):
    colour().save(
        tmp_path / f"a.{kind}", save_all=True, append_images=[grey().convert("RGB"), colour().rotate(180)]
    )
    refused(tmp_path / f"a.{kind}", "3 frames")


def test_a_bomb(tmp_path):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (12_000, 100_000):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(data)
        refused(tmp_path / "a.png", "pixels")


@pytest.mark.parametrize("size", [(2010, 10), (10, 2010), (201, 1), (1, 5000)])
def test_too_long(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "200 : 1")


def test_as_long_as_allowed(tmp_path):
    for size in ((2000, 10), (1, 200), (1, 1)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        assert open_image(tmp_path / "a.png").size == size


def test_empty_and_damaged(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    refused(tmp_path / "a.png", "none of")
    (tmp_path / "b.png").write_text("<html>")
    refused(tmp_path / "b.png", "none of")
    for kind in ("png", "jpg", "webp", "tif", "bmp", "gif"):
        colour().save(tmp_path / f"c.{kind}")
        data = (tmp_path / f"c.{kind}").read_bytes()
        (tmp_path / f"c.{kind}").write_bytes(data[: len(data) * 2 // 3])
        refused(tmp_path / f"c.{kind}", "cannot read")
    (tmp_path / "d.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    refused(tmp_path / "d.svg", "none of")
    refused(tmp_path / "none.png", "No such file")
    refused(tmp_path, "no file")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "no file")
    refused(tmp_path / ("x" * 300), "too long")


def test_floats_without_a_range(tmp_path):
    for values, words in (
        (np.full((8, 8), np.nan, np.float32), "NaN"),
        (np.full((8, 8), -0.5, np.float32), "negative"),
        (np.full((8, 8), 1e6, np.float32), "scale"),
        (np.full((8, 8), -1, np.int32), "negative"),
    ):
        Image.fromarray(values).save(tmp_path / "a.tif")
        refused(tmp_path / "a.tif", words)
        with pytest.raises(OptionError, match=words):
            picture(values)


@pytest.mark.parametrize(
    "source",
    [
        None, b"bytes", {"bytes": b""}, np.zeros((2, 3, 4, 3)), np.zeros((5, 6, 7)), np.zeros((0, 4, 3)),
        Image.new("RGB", (0, 4)), Image.new("RGB", (1000, 2)), np.array(["a"]), np.zeros(7), 3,
    ],
)  # fmt: skip
def test_what_is_handed_in(source):
    with pytest.raises(OptionError, match="handed in"):
        picture(source)
