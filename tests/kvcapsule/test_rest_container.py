"""Containers: no byte, no length and no piece can change without being noticed."""

from __future__ import annotations

from io import BytesIO

import pytest

from capsight.errors import CapsuleFileError
from capsight.kvcapsule.rest.container import FORMAT_VERSION, MAGIC, Container, write_container

PIECES = (b"0123456789", b"", b"abcdefghij", b"klmnopqrst")


def written(header=None, pieces=PIECES) -> bytes:
    file = BytesIO()
    write_container(file, header or {"kind": "cache", "ids": [[1, 2]]}, pieces)
    return file.getvalue()


def read(data: bytes) -> list[bytes]:
    opened = Container(BytesIO(data), "x")
    return [opened.piece(i) for i in range(len(opened.sizes))]


def test_what_was_written_is_read():
    opened = Container(BytesIO(written()), "x")
    assert opened.header == {"kind": "cache", "ids": [[1, 2]]}
    assert [opened.piece(i) for i in range(4)] == [*PIECES]
    assert opened.nbytes == len(written())
    for index in (-1, 4):
        with pytest.raises(CapsuleFileError, match="no piece"):
            opened.piece(index)


@pytest.mark.parametrize("flip", [1, 128, 255])
def test_every_byte_counts(flip):
    good = written()
    for at in range(len(good)):
        with pytest.raises(CapsuleFileError):
            read(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])


def test_every_length_counts():
    good = written()
    for length in range(len(good)):
        with pytest.raises(CapsuleFileError):
            read(good[:length])
    for more in (b"\0", good):
        with pytest.raises(CapsuleFileError, match="follows"):
            read(good + more)


def test_pieces_hold_at_their_place_in_their_file_alone():
    """Of equal length, so that no size tells."""
    good, length = written(), len(PIECES[0]) + 8
    begin = len(good) - 3 * length - 8
    first, second = good[begin : begin + length], good[-length:]
    with pytest.raises(CapsuleFileError, match="piece 0"):
        read(good[:begin] + second + good[begin + length : -length] + first)
    other = written({"kind": "cache", "ids": [[1, 3]]})
    with pytest.raises(CapsuleFileError, match="piece 3"):
        read(good[:-length] + other[-length:])
    with pytest.raises(CapsuleFileError):
        read(other[: len(other) - 3 * length - 8] + good[begin:])


@pytest.mark.parametrize("version", [0, 1, FORMAT_VERSION - 1, FORMAT_VERSION + 1, 65535])
def test_other_versions_are_named(version):
    good = written()
    with pytest.raises(CapsuleFileError, match=rf"version {version}, .* reads {FORMAT_VERSION}"):
        read(MAGIC + version.to_bytes(2, "little") + good[len(MAGIC) + 2 :])


@pytest.mark.parametrize("data", [b"", b"c", MAGIC[:-1], MAGIC, MAGIC + b"\3", b"PK\3\4" * 20])
def test_what_is_no_container_is_refused(data):
    with pytest.raises(CapsuleFileError):
        read(data)
