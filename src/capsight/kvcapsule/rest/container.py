"""`Container`: one small file of a JSON header and pieces of bytes, each of which can be read alone.

Every byte is covered: the header by a digest before it, pieces by digests that hold at their place in this
file alone, and the file's length by the header. A header of zlib-packed JSON takes a tenth of what tensors by
name would; zlib is given beforehand what headers have in common.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, BinaryIO

from capsight.errors import CapsuleFileError

MAGIC = b"capsrest"
FORMAT_VERSION = 3
_START = struct.Struct("<8sHI16s")  # magic, version, bytes of the header, its digest
_COMMON = (  # changes with `FORMAT_VERSION` alone
    b'"name":","tokens":0,0,0,0,0,0,0,0,0,0,0,"first":true,"kind":"image","text":"video","frame_seconds":0.5}]},'
    b'{"length":{"layout":{"rows":[{"length":,"pad_left":0,"blocks":[{"start":,"end":,"kind":"image","grid":[1,,'
    b'"image":0,"delimiters":[],"frame_seconds":null},{"start":],"frame_seconds":null}]}]},"settled":,"sliding":{},'
    b'"kind":"cache","ids":[[]],"prompt":,"images":[["0123456789abcdef"]],"model":"","capsule":"",'
    b'"dtype":"torch.bfloat16","reread":true,"quality":0.98,"pieces":['
)
_SEAL = 8  # bytes of a piece's digest
_LARGEST = 1 << 28  # bytes of a header; its JSON is bounded as well


def write_container(file: BinaryIO, header: Mapping[str, Any], pieces: Sequence[bytes]) -> None:
    """Write a container.

    Args:
        file: where to.
        header: JSON-ready values.
        pieces: of bytes.
    """
    sizes = [len(piece) + _SEAL for piece in pieces]
    text = json.dumps({**header, "pieces": sizes}, separators=(",", ":"))
    packer = zlib.compressobj(9, zdict=_COMMON)
    packed = packer.compress(text.encode()) + packer.flush()
    file.write(_START.pack(MAGIC, FORMAT_VERSION, len(packed), _digest(packed)))
    file.write(packed)
    for index, piece in enumerate(pieces):
        file.write(_seal(piece, packed, index) + piece)


class Container:
    """A container that lies open for reading.

    Attributes:
        header: as it was written.
        nbytes: length of the file.
        sizes: bytes of each piece.
    """

    def __init__(self, file: BinaryIO, name: object) -> None:
        """Read and check the header.

        Args:
            file: seekable.
            name: of the file, for errors.

        Raises:
            CapsuleFileError: it is no container, or truncated, changed, or of another version.
        """
        self._file, self._name = file, name
        start = file.read(_START.size)
        if start[: len(MAGIC)] != MAGIC:
            raise CapsuleFileError(f"{name} does not hold capsules at rest")
        if len(start) < _START.size:
            raise self._broken("it is truncated")
        _, version, length, digest = _START.unpack(start)
        if version != FORMAT_VERSION:
            raise CapsuleFileError(
                f"{name} has format version {version}, this capsight reads {FORMAT_VERSION}; use the "
                "capsight that wrote it, or save it again"
            )
        packed = file.read(min(length, _LARGEST))
        if len(packed) != length or _digest(packed) != digest:
            raise self._broken("its header has the wrong checksum")
        try:
            unpacker = zlib.decompressobj(zdict=_COMMON)
            self.header: dict[str, Any] = json.loads(unpacker.decompress(packed, _LARGEST))
            self.sizes = [int(size) for size in self.header.pop("pieces")]
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._broken(f"its header is malformed: {error}") from error
        self._packed, self._start = packed, _START.size + length
        self.nbytes = self._start + sum(self.sizes)
        if file.seek(0, 2) != self.nbytes or min(self.sizes, default=0) < 0:
            raise self._broken("it is truncated, or something follows it")

    def piece(self, index: int) -> bytes:
        """One piece, read and checked now and alone.

        Raises:
            CapsuleFileError: there is none, it cannot be read, was changed, or is of another place or file.
        """
        if not 0 <= index < len(self.sizes):
            raise self._broken(f"it has no piece {index}")
        try:
            self._file.seek(self._start + sum(self.sizes[:index]))
            data = self._file.read(self.sizes[index])
        except OSError as error:
            raise CapsuleFileError(f"cannot read {self._name}: {error.strerror or error}") from error
        if _seal(data[_SEAL:], self._packed, index) != data[:_SEAL]:
            raise self._broken(f"piece {index} has the wrong checksum")
        return data[_SEAL:]

    def _broken(self, why: str) -> CapsuleFileError:
        return CapsuleFileError(f"{self._name} cannot be used: {why}; copy it again, or save it again")


def _seal(piece: bytes, packed: bytes, index: int) -> bytes:
    """Digest of a piece at its place in the file with this header."""
    return blake2b(piece, digest_size=_SEAL, key=_digest(packed), salt=index.to_bytes(16, "little")).digest()


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
