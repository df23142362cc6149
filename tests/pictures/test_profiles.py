"""Colour profiles and gamma: colours are read as those of sRGB."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageCms

from capsight.pictures import open_image
from pictures.test_formats import clear, colour, grey, over_white, png, same


def profile_of(gamma: float, space: str = "RGB") -> bytes:
    """An ICC profile with sRGB's primaries (D50) and another tone curve, written by hand."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 79
    tags = {b"desc": text, b"wtpt": xyz(0.9642, 1.0, 0.8249), b"cprt": b"text\0\0\0\0none"}
    if space == "RGB":
        primaries = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
        for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
            tags |= {name: xyz(*values), name[:1] + b"TRC": curve}
    else:
        tags[b"kTRC"] = curve
    start, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    signature = b"RGB " if space == "RGB" else b"GRAY"
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", signature, b"XYZ ")
    head = (head + b"\0" * 12 + b"acsp" + b"\0" * 28).ljust(68, b"\0")
    head += struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, image in (("a", colour()), ("b", grey()), ("c", clear(colour())), ("d", colour().quantize(9))):
        image.save(tmp_path / f"{name}.png", icc_profile=srgb)
        wanted = over_white(colour()) if name == "c" else image
        same(open_image(tmp_path / f"{name}.png"), wanted)


def test_colours_of_a_profile_are_those_of_srgb(tmp_path):
    wide = profile_of(1.0)
    linear = ImageCms.profileToProfile(
        colour(), ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(wide))
    )
    assert abs(np.asarray(linear, int) - np.asarray(colour(), int)).max() > 30
    for kind in ("png", "tif"):
        linear.save(tmp_path / f"a.{kind}", icc_profile=wide)
        same(open_image(tmp_path / f"a.{kind}"), colour(), 12)  # 8 linear bits are coarse in the dark
    clear(linear).save(tmp_path / "rgba.png", icc_profile=wide)
    same(open_image(tmp_path / "rgba.png"), over_white(colour()), 12)
    bright = Image.fromarray(np.full((24, 40), 128, np.uint8))
    bright.save(tmp_path / "g.png", icc_profile=profile_of(1.0, "GRAY"))
    assert abs(open_image(tmp_path / "g.png").getpixel((0, 0))[0] - 188) <= 1


def test_profiles_that_say_nothing(tmp_path):
    for name, profile in (("a", b"no profile"), ("b", profile_of(1.0, "GRAY")), ("c", profile_of(1.0)[:200])):
        colour().save(tmp_path / f"{name}.png", icc_profile=profile)
        same(open_image(tmp_path / f"{name}.png"), colour())


def test_gamma_of_a_png(tmp_path):
    rows = np.asarray(colour()).reshape(24, -1)
    for gamma, chunks, changed in (
        (45455, (), False), (100000, (), True), (100000, ((b"sRGB", b"\0"),), False)
    ):  # fmt: skip
        data = png(8, 2, rows, (b"gAMA", struct.pack(">I", gamma)), *chunks)
        (tmp_path / "a.png").write_bytes(data)
        read = open_image(tmp_path / "a.png")
        if changed:
            linear = np.asarray(colour(), float) / 255
            assert abs(np.asarray(read, float) - 255 * linear ** (1 / 2.2)).max() <= 1
        else:
            same(read, colour())
