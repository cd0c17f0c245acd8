"""One tensor to bytes and back, bit by bit: shared values as codes, removed ones as positions, the rest as planes of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.coding import positions, streams
from secateur.coding.bits import ByteReader, ByteWriter, DecodeError
from secateur.coding.positions import Positions
from secateur.coding.streams import MAX_ALPHABET, Entropy
from secateur.runtime.formats.bitmask import words

_PLANES, _BOOK, _SCALED = range(3)
_RAW, _CODED = range(2)
_SAMPLE = 1 << 14  # values looked at before all are sorted
_DENSE = 0.5  # share of kept values from which zeros are symbols like all others, in layers too large to try both
_WORD = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True)
class Coded:
    """A weight as whole numbers times a scale for each index of its first dimension; 0 stands for a removed weight.

    ``codes`` int16 in the shape of the weight, from -2047 to 2047; ``scales`` float32 ``[shape[0]]``. The weight is exactly
    ``codes * scales`` in float32, rounded to `dtype`.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype = torch.float32

    def values(self) -> Tensor:
        """The weight."""
        rows = self.codes.reshape(len(self.scales), -1).float() * self.scales[:, None]
        return (rows + 0.0).to(self.dtype).reshape(self.codes.shape)  # + 0.0: a removed weight is never -0.0


@dataclass(frozen=True)
class Bits:
    """Where the bits of one tensor went, beside the entropies that bound them."""

    elements: int
    kept: int
    positions: int  #: coded; 0 where zeros are symbols like all others
    values: int  #: coded codes or planes, with their tables and scales
    positions_bound: float  #: log2 of the number of masks with as many kept
    values_bound: float  #: order-0 entropy of the kept codes; of their bytes where they are not shared


@dataclass(frozen=True)
class Options:
    """How streams are coded."""

    entropy: Entropy = "rans"
    positions: Positions = "auto"


def encode(tensor: Tensor, coded: Coded | None = None, options: Options | None = None) -> tuple[bytes, Bits]:
    """``tensor [any shape]`` -> bytes that `decode` reads, given dtype and shape, and what they are made of.

    With `coded`, which must stand for exactly these values, whole numbers and scales are stored. Without, a tensor of at
    most 4096 different values becomes codes and a codebook, and any other planes of bytes.
    """
    options = options or Options()
    flat = _words(tensor)
    matrix = _matrix(tensor.shape)
    if coded is not None:
        symbols = _zigzag(coded.codes)
        kept = symbols != 0
        table = _scaled_table(coded)
        kind = _SCALED
    else:
        kept = flat != 0
        found = _book(flat)
        kind = _PLANES if found is None else _BOOK
        symbols, table = (flat, b"") if found is None else found
    return _smallest(kind, symbols, kept.reshape(matrix), table, options)


def decode(data: bytes | memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The inverse of `encode`. Raises DecodeError for bytes that `encode` cannot have written."""
    reader = ByteReader(data)
    count = math.prod(shape)
    kind, separate = divmod(reader.varint(6), 2)
    table = _read_table(reader, kind, dtype, shape)
    where = positions.decode(reader, _matrix(shape)) if separate else None
    stored = count if where is None else len(where)
    if kind == _PLANES:
        values = _read_planes(reader, stored, dtype.itemsize)
    else:
        values = streams.decode(reader, stored)
    if any(reader.raw(reader.left)):
        raise DecodeError("more than padding follows after the values")
    if kind == _SCALED:
        return _scaled(values, where, table, dtype, shape)
    found = values if kind == _PLANES else _looked_up(table, values)
    if where is not None:
        dense = np.zeros(count, found.dtype)
        dense[where] = found
        found = dense
    return torch.from_numpy(found).view(dtype).reshape(tuple(shape))


def _smallest(kind: int, symbols: np.ndarray, kept: np.ndarray, table: bytes, options: Options) -> tuple[bytes, Bits]:
    """Zeros as symbols, or positions apart: whichever is shorter."""
    count = int(np.count_nonzero(kept))
    share = count / kept.size if kept.size else 1.0
    inside = symbols[kept.reshape(-1)] if share < 1 else symbols
    made: list[tuple[bytes, int]] = []
    small = kept.size <= positions.CONTEXT_CELLS
    if share == 1 or (kind != _PLANES and (share >= _DENSE or small)):
        made.append(_assembled(kind, False, table, b"", _values(kind, symbols, options)))
    if share < 1 and (small or share < _DENSE or kind == _PLANES):
        where = positions.encode(kept, options.entropy, options.positions)
        made.append(_assembled(kind, True, table, where, _values(kind, inside, options)))
    data, where_bytes = min(made, key=lambda m: len(m[0]))
    if kind == _PLANES:
        bound = sum(streams.entropy_bits(np.bincount(plane)) for plane in _bytes_of(inside))
    else:
        bound = streams.entropy_bits(np.bincount(inside)) if len(inside) else 0.0
    bits = Bits(kept.size, count, 8 * where_bytes, 8 * (len(data) - where_bytes), positions.bound_bits(kept.size, count), bound)
    return data, bits


def _assembled(kind: int, separate: bool, table: bytes, where: bytes, values: bytes) -> tuple[bytes, int]:
    return bytes([2 * kind + separate]) + table + where + values, len(where)


def _values(kind: int, symbols: np.ndarray, options: Options) -> bytes:
    return _planes(symbols, options) if kind == _PLANES else streams.encode(symbols, options.entropy)


def _words(tensor: Tensor) -> np.ndarray:
    """The bit patterns as unsigned numbers."""
    flat = words(tensor)
    return flat.view(_WORD[flat.dtype.itemsize])


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows are the first dimension; a vector is one row."""
    if len(shape) < 2 or 0 in shape:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _book(flat: np.ndarray) -> tuple[np.ndarray, bytes] | None:
    """Codes uint16 and the codebook's bytes, where there are few different values; 0 comes first where it occurs."""
    book = np.unique(flat[:: max(1, flat.size // _SAMPLE)])
    while len(book) <= MAX_ALPHABET:  # the sample may have missed rare values: they join until none is missing
        codes = np.searchsorted(book, flat).astype(np.uint16) if len(book) else np.zeros(0, np.uint16)
        missed = flat[book[np.minimum(codes, len(book) - 1)] != flat] if len(book) else flat
        if not missed.size:
            break
        book = np.union1d(book, missed[:_SAMPLE])
    if len(book) > MAX_ALPHABET or (flat.size and len(book) * flat.dtype.itemsize * 2 > flat.nbytes and len(book) > 1):
        return None
    writer = ByteWriter()
    writer.varint(len(book))
    writer.raw(_planes(book, Options()))
    return codes, writer.getvalue()


def _read_table(reader: ByteReader, kind: int, dtype: torch.dtype, shape: Sequence[int]) -> np.ndarray:
    if kind == _BOOK:
        return _read_planes(reader, reader.varint(MAX_ALPHABET + 1), dtype.itemsize)
    if kind == _SCALED:
        if not dtype.is_floating_point or not shape or dtype.itemsize > 4:
            raise DecodeError(f"a tensor {dtype} {list(shape)} cannot have scales")
        return _read_planes(reader, shape[0], 4).view(np.float32)
    return np.empty(0, np.float32)


def _looked_up(book: np.ndarray, codes: np.ndarray) -> np.ndarray:
    if codes.size and (not book.size or codes.max() >= len(book)):
        raise DecodeError(f"a code is beyond the {len(book)} entries of its codebook")
    return book.take(codes)


def _planes(flat: np.ndarray, options: Options) -> bytes:
    """Each byte of the words by itself: exponents repeat, and the last bytes of rounded numbers are zeros."""
    writer = ByteWriter()
    for plane in _bytes_of(flat):
        coded = streams.encode(plane.astype(np.uint16), options.entropy)
        smaller = len(coded) < plane.size
        writer.varint(_CODED if smaller else _RAW)
        writer.raw(coded if smaller else plane)
    return writer.getvalue()


def _read_planes(reader: ByteReader, count: int, itemsize: int) -> np.ndarray:
    out = np.empty((count, itemsize), np.uint8)
    for place in range(itemsize):
        if reader.varint(2) == _RAW:
            out[:, place] = np.frombuffer(reader.raw(count), np.uint8)
        else:
            plane = streams.decode(reader, count)
            if plane.size and plane.max() > 255:
                raise DecodeError("a byte is larger than 255")
            out[:, place] = plane
    return out.reshape(-1).view(_WORD[itemsize])


def _bytes_of(flat: np.ndarray) -> list[np.ndarray]:
    table = np.ascontiguousarray(flat).view(np.uint8).reshape(flat.size, flat.dtype.itemsize)
    return [np.ascontiguousarray(table[:, place]) for place in range(flat.dtype.itemsize)]


def _zigzag(codes: Tensor) -> np.ndarray:
    """0, -1, 1, -2, 2 ... -> 0, 1, 2, 3, 4 ... as uint16."""
    signed = codes.detach().cpu().contiguous().reshape(-1).numpy().astype(np.int32)
    return ((signed << 1) ^ (signed >> 31)).astype(np.uint16)


def _scaled_table(coded: Coded) -> bytes:
    return _planes(_words(coded.scales.float()), Options())


def _scaled(
    values: np.ndarray, where: np.ndarray | None, scales: np.ndarray, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    signed = (values >> 1).astype(np.int16) ^ -(values & 1).astype(np.int16)
    if where is not None:
        codes = np.zeros(math.prod(shape), np.int16)
        codes[where] = signed
        signed = codes
    return Coded(torch.from_numpy(signed).reshape(tuple(shape)), torch.from_numpy(scales), dtype).values()
