"""Equal pictures stored in different ways are read as equal pixels."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from capsight.pictures import open_image, picture
from tiny.base import picture as blobs

SIZE = (40, 24)


def grey() -> Image.Image:
    return Image.fromarray(np.arange(960, dtype=np.uint8).reshape(24, 40))


def levels() -> np.ndarray:
    return np.asarray(grey())


def colour() -> Image.Image:
    return blobs(3, SIZE)


def same(read: Image.Image, wanted: Image.Image, within: int = 0) -> None:
    assert read.mode == "RGB"
    assert read.size == wanted.size
    assert abs(np.asarray(read, int) - np.asarray(wanted.convert("RGB"), int)).max() <= within


def clear(image: Image.Image) -> Image.Image:
    """With its left half transparent, and some other colour hidden below."""
    hidden = image.convert("RGBA")
    hidden.paste((200, 10, 90, 0), (0, 0, 20, 24))
    return hidden


def over_white(image: Image.Image) -> Image.Image:
    shown = image.convert("RGB")
    shown.paste("white", (0, 0, 20, 24))
    return shown


LOSSLESS = [
    ("png", {}), ("bmp", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}), ("webp", {"lossless": True}),
    ("ppm", {}), ("tga", {}), ("jp2", {"irreversible": False}), ("qoi", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_colour(tmp_path, kind, options):
    colour().save(tmp_path / f"a.{kind}", **options)
    same(open_image(tmp_path / f"a.{kind}"), colour())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "avif"])
def test_orientation(tmp_path, kind, orientation):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    stored, exif = colour(), Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(kind, {})
    stored.save(tmp_path / f"a.{kind}", exif=exif, **options)
    with Image.open(tmp_path / f"a.{kind}") as plain:
        plain.load()
        shown = plain if kind == "tif" else ImageOps.exif_transpose(plain)  # Pillow turns TIFF by itself
    read = open_image(tmp_path / f"a.{kind}")
    same(read, shown)
    assert read.size == (SIZE if orientation < 5 else SIZE[::-1])
    turned = stored.transpose(Image.Transpose.ROTATE_270)
    if orientation == 6 and kind != "avif":
        same(read, turned, 0 if kind in ("png", "tif", "webp") else 40)


@pytest.mark.parametrize("kind", ["png", "webp", "tif", "tga", "jp2", "ico"])
def test_transparency_lies_over_white(tmp_path, kind):
    options = {"webp": {"lossless": True, "exact": True}, "ico": {"sizes": [SIZE]}}.get(kind, {})
    clear(colour()).save(tmp_path / f"a.{kind}", **options)
    same(open_image(tmp_path / f"a.{kind}"), over_white(colour()))


def test_other_kinds_of_transparency(tmp_path):
    few = colour().quantize(16)
    flat = few.convert("RGB")
    shown = flat.copy()
    shown.putdata(
        [(255, 255, 255) if i == 3 else c for i, c in zip(few.getdata(), flat.getdata(), strict=True)]
    )
    for kind in ("png", "gif"):
        few.save(tmp_path / f"p.{kind}", transparency=3)
        same(open_image(tmp_path / f"p.{kind}"), shown)
    alpha = bytes(0 if i == 3 else 255 for i in range(256))
    few.save(tmp_path / "pa.png", transparency=alpha)
    same(open_image(tmp_path / "pa.png"), shown)
    rgb = colour()
    rgb.paste((1, 2, 3), (0, 0, 20, 24))
    rgb.save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    same(open_image(tmp_path / "rgb.png"), over_white(colour()))
    plain = grey().point(lambda v: max(v, 1))
    plain.paste(0, (0, 0, 20, 24))
    plain.save(tmp_path / "l.png", transparency=0)
    same(open_image(tmp_path / "l.png"), over_white(plain))
    both = plain.convert("LA")
    both.putalpha(Image.fromarray(np.where(np.asarray(plain) == 0, 0, 255).astype(np.uint8)))
    both.save(tmp_path / "la.png")
    same(open_image(tmp_path / "la.png"), over_white(plain))
    for mode in ("RGBa", "La"):
        same(picture((clear(colour()) if mode == "RGBa" else both).convert(mode)),
             over_white(colour() if mode == "RGBa" else plain), 1)  # fmt: skip
    half = colour().convert("RGBA")
    half.putalpha(128)
    half.save(tmp_path / "half.png")
    expected = (np.asarray(colour(), float) * 128 + 255 * 127) / 255
    assert abs(np.asarray(open_image(tmp_path / "half.png"), float) - expected).max() <= 1


def png(depth: int, kind: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of colour type `kind` from rows of bytes `[H, B]`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", SIZE[0], SIZE[1], depth, kind, 0, 0, 0)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("factor", [256, 257])
def test_sixteen_bits(tmp_path, factor):
    wide = levels().astype(np.uint16) * factor
    for kind in ("png", "tif", "jp2"):
        Image.fromarray(wide).save(
            tmp_path / f"a.{kind}", **({"irreversible": False} if kind == "jp2" else {})
        )
        same(open_image(tmp_path / f"a.{kind}"), grey())
    Image.fromarray(wide.astype(np.int32)).save(tmp_path / "a.pgm")
    same(open_image(tmp_path / "a.pgm"), grey())
    dark = levels().astype(np.int32)  # a picture of 16 bits that is nearly black
    Image.fromarray(dark).save(tmp_path / "dark.pgm")
    same(open_image(tmp_path / "dark.pgm"), grey().point(lambda v: 0))
    Image.fromarray(wide.astype(">u2")).save(tmp_path / "b.tif")
    same(open_image(tmp_path / "b.tif"), grey())
    rgb = (np.asarray(colour(), np.uint16) * factor).astype(">u2").reshape(24, -1)
    (tmp_path / "rgb.png").write_bytes(png(16, 2, rgb))
    same(open_image(tmp_path / "rgb.png"), colour())
    rgba = (np.asarray(clear(colour()), np.uint16) * factor).astype(">u2").reshape(24, -1)
    (tmp_path / "rgba.png").write_bytes(png(16, 6, rgba))
    same(open_image(tmp_path / "rgba.png"), over_white(colour()), 1 if factor == 256 else 0)
    hole = wide.copy()
    hole[:, :20] = 7
    (tmp_path / "hole.png").write_bytes(png(16, 0, hole.astype(">u2"), (b"tRNS", struct.pack(">H", 7))))
    same(open_image(tmp_path / "hole.png"), over_white(grey()))


@pytest.mark.parametrize(
    "values",
    [
        levels().astype(np.float32) / 255, levels().astype(np.float32), levels().astype(np.float32) * 257,
        levels().astype(np.int32), levels().astype(np.int32) * 257, levels().astype(np.int32) << 23,
    ],
)  # fmt: skip
def test_floats_and_long_integers_in_files_images_and_arrays(tmp_path, values):
    image = Image.fromarray(values)
    image.save(tmp_path / "a.tif")
    same(open_image(tmp_path / "a.tif"), grey())
    same(picture(image), grey())
    same(picture(values), grey())


def test_unsigned_long_integers(tmp_path):
    wide = (levels().astype(np.uint32) * 0x01010101).view(np.int32)
    Image.fromarray(wide).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert data.count(signed) == 1
    (tmp_path / "a.tif").write_bytes(data.replace(signed, unsigned))
    same(open_image(tmp_path / "a.tif"), grey())


def test_one_bit_and_few_bits(tmp_path):
    bits = grey().point(lambda v: 255 * (v > 99))
    for kind in ("png", "tif", "bmp", "gif"):
        bits.convert("1").save(tmp_path / f"a.{kind}")
        same(open_image(tmp_path / f"a.{kind}"), bits)
    few = colour().quantize(4)
    few.save(tmp_path / "p.png", bits=2)
    same(open_image(tmp_path / "p.png"), few)


def test_cmyk(tmp_path):
    for kind in ("tif", "jpg"):
        options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {}
        colour().convert("CMYK").save(tmp_path / f"a.{kind}", **options)
        same(open_image(tmp_path / f"a.{kind}"), colour(), 0 if kind == "tif" else 6)


def test_other_modes():
    same(picture(colour().convert("YCbCr")), colour(), 3)
    same(picture(colour().convert("HSV")), colour(), 6)
    same(picture(colour().convert("RGBX")), colour())
    lab = ImageCms.profileToProfile(
        colour(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    difference = np.asarray(picture(lab), int) - np.asarray(colour(), int)
    assert abs(difference).mean() < 3  # 8 bits of LAB are coarse


def test_a_second_picture_of_a_phone_is_left_alone(tmp_path):
    colour().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[grey().convert("RGB")],
                  quality=100, subsampling=0)  # fmt: skip
    with Image.open(tmp_path / "a.jpg") as stored:
        assert (stored.format, stored.n_frames) == ("MPO", 2)
    same(open_image(tmp_path / "a.jpg"), colour(), 6)


def test_arrays():
    rgb = np.asarray(colour())
    for values in (rgb, rgb.transpose(2, 0, 1), rgb.astype(np.uint16) * 257, rgb / 255, rgb.astype(int)):
        same(picture(values), colour())
    same(picture(np.asarray(clear(colour()))), over_white(colour()))
    same(picture(levels()[..., None]), grey())
    same(picture(levels() > 99), grey().point(lambda v: 255 * (v > 99)))
    import torch

    same(picture(torch.from_numpy(rgb.copy()).permute(2, 0, 1)), colour())
