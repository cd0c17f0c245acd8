"""A binary arithmetic coder with an adaptive model of masks; native/codec.cpp is the same, fifty times as fast.

Only whole numbers are computed with, so that every machine decodes the same mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from secateur.coding.bits import DecodeError
from secateur.coding.kernels import compiled

_RATES = [131072 // (2 * n + 3) for n in range(1024)]  # 65536 / (n + 1.5): how far the n-th observation moves an estimate
_TOP = 1 << 24


def encode_mask(mask: np.ndarray, density: int) -> bytes:
    """``mask bool [rows, cols]`` -> bytes. `density`, in 1/65536, is where all estimates begin."""
    if (kernels := compiled()) is not None:
        flat = np.ascontiguousarray(mask).reshape(-1).view(np.uint8)
        return kernels.mask_encode(flat, *mask.shape, density).tobytes()
    writer = _Writer(mask)
    _model(mask.shape, density, writer)
    return writer.finished()


def decode_mask(data: bytes | memoryview, shape: tuple[int, int], density: int) -> np.ndarray:
    """The inverse of `encode_mask`: bool ``[rows, cols]``. Raises DecodeError where bytes are left over."""
    if not 0 < density < 65536:
        raise DecodeError(f"a density of {density} / 65536 is not possible")
    if (kernels := compiled()) is not None:
        out = np.zeros(shape[0] * shape[1], np.uint8)
        try:
            kernels.mask_decode(np.frombuffer(data, np.uint8), *shape, density, out)
        except ValueError as error:
            raise DecodeError(str(error)) from None
        return out.view(np.bool_).reshape(shape)
    reader = _Reader(data, shape)
    _model(shape, density, reader)
    if reader.at < len(data):
        raise DecodeError("the positions end before their stream")
    return reader.mask


class _Adaptive:
    """The probability of a one in 2^-28, so that small ones do not drift, moved by 1 / (n + 1.5) at the n-th observation."""

    __slots__ = ("fine", "n")

    def __init__(self, p: int, n: int):
        self.fine, self.n = p << 12, n

    @property
    def p(self) -> int:
        """In 1/65536, as the coder takes it."""
        return self.fine >> 12

    def see(self, bit: int, limit: int) -> None:
        self.fine += ((bit << 28) - self.fine) * _RATES[self.n] >> 16
        if self.n < limit:
            self.n += 1


class _Coder(Protocol):
    """One side of the model: what a bit is, known to the writer and found out by the reader."""

    def row(self, index: int, p: int) -> int: ...
    def column(self, index: int, p: int) -> int: ...
    def cell(self, row: int, column: int, p: int) -> int: ...


class _Writer:
    """32 bits of range; a carry goes back into the bytes already written."""

    def __init__(self, mask: np.ndarray):
        self._rows: Any = mask.any(1).tolist()
        self._columns: Any = mask.any(0).tolist()
        self._mask: list[list[bool]] = mask.tolist()
        self._out = bytearray()
        self._low, self._range = 0, 0xFFFFFFFF

    def row(self, index: int, p: int) -> int:
        return self._put(int(self._rows[index]), p)

    def column(self, index: int, p: int) -> int:
        return self._put(int(self._columns[index]), p)

    def cell(self, row: int, column: int, p: int) -> int:
        return self._put(int(self._mask[row][column]), p)

    def finished(self) -> bytes:
        """The shortest number in the last interval; the reader supplies the zeros at its end."""
        top = self._low + self._range - 1
        self._low = next(value for zeros in (32, 24, 16, 8, 0) if (value := top >> zeros << zeros) >= self._low)
        for _ in range(4):
            self._shift()
        return bytes(self._out.rstrip(b"\0"))

    def _put(self, bit: int, p: int) -> int:
        bound = (self._range >> 16) * p
        if bit:
            self._range = bound
        else:
            self._low += bound
            self._range -= bound
        while self._range < _TOP:
            self._shift()
            self._range <<= 8
        return bit

    def _shift(self) -> None:
        if self._low >> 32:
            at = len(self._out) - 1
            while self._out[at] == 255:
                self._out[at] = 0
                at -= 1
            self._out[at] += 1
        self._out.append(self._low >> 24 & 255)
        self._low = (self._low & 0xFFFFFF) << 8


class _Reader:
    """The inverse of `_Writer`; fills `mask`."""

    def __init__(self, data: bytes | memoryview, shape: tuple[int, int]):
        self._data, self.at = bytes(data), 0
        self.mask = np.zeros(shape, np.bool_)
        self._code, self._range = 0, 0xFFFFFFFF
        for _ in range(4):
            self._next()

    def row(self, index: int, p: int) -> int:
        return self._get(p)

    column = row

    def cell(self, row: int, column: int, p: int) -> int:
        bit = self._get(p)
        if bit:
            self.mask[row, column] = True
        return bit

    def _get(self, p: int) -> int:
        bound = (self._range >> 16) * p
        bit = int(self._code < bound)
        if bit:
            self._range = bound
        else:
            self._code -= bound
            self._range -= bound
        while self._range < _TOP:
            self._next()
            self._range <<= 8
        return bit

    def _next(self) -> None:
        byte = self._data[self.at] if self.at < len(self._data) else 0
        self._code = (self._code << 8 | byte) & 0xFFFFFFFF
        self.at += 1


def _clamped(p: int) -> int:
    return min(max(p, 16), 65536 - 16)


def _shifted(value: int, by: int) -> int:
    return value << by if by >= 0 else value >> -by


def _flags(count: int, code: Callable[[int, int], int]) -> list[int]:
    """One bit for each row or column: whether it holds anything."""
    seen, found = _Adaptive(32768, 0), []
    for index in range(count):
        found.append(code(index, _clamped(seen.p)))
        seen.see(found[-1], 255)
    return found


def _model(shape: tuple[int, int], density: int, coder: _Coder) -> None:
    """Which rows and columns hold anything, then each of their cells, with the probabilities that both sides compute."""
    rows = _flags(shape[0], coder.row)
    columns = [c for c, alive in enumerate(_flags(shape[1], coder.column)) if alive]
    inverse = (16 << 16) // density

    def level(p: int) -> int:
        """How full against the whole: 4 as full, one more for twice as full; 0 to 7."""
        return min(max(min(p * inverse >> 16, 255).bit_length(), 1), 8) - 1

    expected = [min(max(_shifted(density, int((r + c - 8) / 2)), 16), 60000) for r in range(8) for c in range(8)]
    cells = [_Adaptive(p, 3) for p in expected for _ in range(4)]
    window = min(max(4 * 65536 // density, 63), 1023)
    column = [_Adaptive(density, 3) for _ in columns]
    column_level = [level(density)] * len(columns)
    above = [0] * len(columns)
    for r in range(shape[0]):
        if not rows[r]:
            above = [0] * len(columns)
            continue
        row, left = _Adaptive(density, 3), 0
        for k, c in enumerate(columns):
            cell = cells[(level(row.p) * 8 + column_level[k]) * 4 + left * 2 + above[k]]
            bit = coder.cell(r, c, _clamped(cell.p))
            cell.see(bit, 1023)
            row.see(bit, window)
            column[k].see(bit, window)
            column_level[k] = level(column[k].p)
            left = above[k] = bit
