"""Compressed files, known by the bytes they begin with."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import BinaryIO

from hopescale.common.errors import DataError

_ZSTD_WINDOW = 1 << 31  # bytes; the longest that `zstd --long` writes
_PART = 1 << 17
_CUT = "the compressed data ends before its end mark"


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """Return a stream of the contents of gzip, bzip2, xz or Zstandard data, or of the bytes as they are.

    Args:
        stream: Stream at its beginning; it need not be able to go back.
        name: Name of the file in messages.

    Raises:
        DataError: If the package is missing that reads it.
        EOFError: While reading, if the compressed data was cut off.
    """
    plain = io.BufferedReader(Readable(stream.read), _PART)
    head = plain.peek(6)
    for begin, unpack in _UNPACK.items():
        if head.startswith(begin):
            return unpack(plain, name)
    return plain


def with_head(stream: BinaryIO, size: int) -> tuple[bytes, BinaryIO]:
    """Return the first bytes of a stream, and a stream of all its bytes, these included."""
    head = stream.read(size)
    rest = memoryview(head)

    def read(size: int) -> bytes:
        nonlocal rest
        if not rest:
            return stream.read(size)
        taken, rest = rest[:size], rest[size:]
        return taken

    return head, io.BufferedReader(Readable(read), _PART)


class Readable(io.RawIOBase):
    """A raw stream for `io.BufferedReader` over a function that reads at most so many bytes."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _zstd(stream: BinaryIO, name: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        message = f"{name}: compressed by Zstandard, which needs the package zstandard"
        raise DataError(message, "pip install 'hopescale[zstd]'") from None
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, rest = unpacker.decompressobj(), memoryview(b"")

    def read(size: int) -> bytes:
        nonlocal frame, rest
        while not rest:
            if frame.eof:
                if not (data := frame.unused_data or stream.read(_PART)):
                    return b""
                frame = unpacker.decompressobj()
            elif not (data := stream.read(_PART)):
                raise EOFError(_CUT)
            try:
                rest = memoryview(frame.decompress(data))
            except zstandard.ZstdError as error:
                raise OSError(f"damaged Zstandard data: {error}") from error
        taken, rest = rest[:size], rest[size:]
        return taken

    return io.BufferedReader(Readable(read), _PART)


_UNPACK: dict[bytes, Callable[[BinaryIO, str], BinaryIO]] = {
    b"\x1f\x8b": lambda stream, name: gzip.GzipFile(fileobj=stream, mode="rb"),
    b"BZh": lambda stream, name: bz2.BZ2File(stream),
    b"\xfd7zXZ\0": lambda stream, name: lzma.LZMAFile(stream),  # noqa: SIM115
    b"\x28\xb5\x2f\xfd": _zstd,
}
