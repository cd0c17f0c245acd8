"""Bytes written and read piece by piece. A reader raises DecodeError at its end instead of handing out less."""

from __future__ import annotations

import numpy as np

from secateur.errors import ArtifactError


class DecodeError(ArtifactError):
    """Bytes that are not what the format allows: damaged, cut short, or made to mislead."""


class ByteWriter:
    """Bytes in the making."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def varint(self, value: int) -> None:
        """A natural number in groups of seven bits, lowest first, 128 added to all but the last (LEB128)."""
        while value >= 128:
            self._parts.append(bytes([value & 127 | 128]))
            value >>= 7
        self._parts.append(bytes([value]))

    def raw(self, data: bytes | memoryview | np.ndarray) -> None:
        """Bytes as they are."""
        self._parts.append(bytes(data))

    def sized(self, data: bytes) -> None:
        """Bytes with their number before them."""
        self.varint(len(data))
        self.raw(data)

    def getvalue(self) -> bytes:
        """All bytes so far."""
        return b"".join(self._parts)


class ByteReader:
    """Reads what `ByteWriter` wrote, never beyond the end."""

    def __init__(self, data: bytes | memoryview):
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def varint(self, limit: int = 2**63) -> int:
        """A natural number below `limit`."""
        value = shift = 0
        while True:
            if self._at >= len(self._data):
                raise DecodeError("the bytes end in the middle of a number")
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if shift > 63:
                raise DecodeError("a number is longer than 63 bits")
        if value >= limit:
            raise DecodeError(f"the number {value} is out of range; at most {limit - 1} is possible here")
        return value

    def raw(self, count: int) -> memoryview:
        """`count` bytes, shared with the input."""
        if count > self.left:
            raise DecodeError(f"{count} bytes are announced and {self.left} are left: cut short")
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece

    def sized(self) -> memoryview:
        """The bytes that `ByteWriter.sized` wrote."""
        return self.raw(self.varint())

    def end(self) -> None:
        """Raise DecodeError unless everything was read."""
        if self.left:
            raise DecodeError(f"{self.left} bytes follow after the end")
