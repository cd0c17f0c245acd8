"""The packed file: tensors as `secateur.coding.tensor` writes them, one after the other, and an index of them.

    bytes 0-6    "SECPACK"
    byte  7      version of the format, 1
    bytes 8-23   where the index begins (8 bytes), its length (4), its CRC-32 (4); little-endian
    from 24      the tensors' bytes, in the order of the index; then padding zeros; then the index

The index has for each tensor its name (what it shares with the name before it is not repeated), dtype, shape, number of bytes
and CRC-32. A tensor is read by itself. What a file may ask for is bounded by its own size: it holds at most 2^24 values and
2048 more for each of its bytes, and is padded where it holds more (layers of zeros), so that no small file fills the memory.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from secateur.coding import tensor as code
from secateur.coding.bits import ByteReader, ByteWriter, DecodeError
from secateur.coding.tensor import Bits, Coded, Options
from secateur.errors import ArtifactError
from secateur.opened import Opened

MAGIC = b"SECPACK"
VERSION = 1
INDEX_CAP = 10_000_000  #: bytes of index that are read at most
FREE_VALUES, VALUES_PER_BYTE = 1 << 24, 2048
_HEADER = struct.Struct("<7sBQII")
#: The order is the format: dtypes are stored as their place in it.
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of the index."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    length: int
    crc: int


def write(path: Path, tensors: Iterable[tuple[str, Tensor, Coded | None]], options: Options | None = None) -> dict[str, Bits]:
    """Write and sync a packed file, one tensor in memory at a time. Says of each where its bits went.

    Names must be unique. Raises ArtifactError for a dtype that the format lacks.
    """
    entries: list[tuple[str, Entry]] = []
    found: dict[str, Bits] = {}
    with open(path, "xb") as file:
        at, values = file.write(bytes(_HEADER.size)), 0
        for name, tensor, coded in tensors:
            if tensor.dtype not in DTYPES:
                raise ArtifactError(f"{name!r} has the dtype {tensor.dtype}, which a packed file cannot hold; convert it first")
            data, found[name] = code.encode(tensor, coded, options)
            file.write(data)
            entries.append((name, Entry(tensor.dtype, tuple(tensor.shape), at, len(data), zlib.crc32(data))))
            at += len(data)
            values += tensor.numel()
        padding = max(0, -(-(values - FREE_VALUES) // VALUES_PER_BYTE) - at)
        file.write(bytes(padding))
        index = _index(entries)
        if len(index) > INDEX_CAP:
            raise ArtifactError(
                f"the names of {len(entries)} tensors need an index of {len(index)} bytes; {INDEX_CAP} are allowed"
            )
        file.write(index)
        file.seek(0)
        file.write(_HEADER.pack(MAGIC, VERSION, at + padding, len(index), zlib.crc32(index)))
        file.flush()
        os.fsync(file.fileno())
    return found


class PackedFile(Opened):
    """A packed file opened for reading. `entries` says what is in it; `read` decodes one tensor.

    `name` is the file's name in error messages. Raises ArtifactError where the file is none, damaged or hostile: everything
    that the index says is checked before the first tensor is decoded.
    """

    def __init__(self, file: BinaryIO, name: str):
        super().__init__(file, name)
        try:
            self.entries = _entries(file)
        except DecodeError as error:
            raise ArtifactError(f"{name}: {error}") from None

    def read(self, key: str) -> Tensor:
        """The tensor `key`, after its checksum was checked."""
        entry = self.entries.get(key)
        if entry is None:
            raise ArtifactError(f"{self.name} has no tensor {key[:200]!r}")
        self.file.seek(entry.begin)
        data = self.file.read(entry.length)
        if len(data) != entry.length or zlib.crc32(data) != entry.crc:
            raise ArtifactError(f"{self.name}: the tensor {key[:200]!r} does not match its checksum: it was damaged or changed")
        try:
            tensor = code.decode(data, entry.dtype, entry.shape)
        except DecodeError as error:
            raise ArtifactError(f"{self.name}: the tensor {key[:200]!r} is broken: {error}") from None
        if entry.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise ArtifactError(f"{self.name}: the bool tensor {key[:200]!r} holds bytes other than 0 and 1")
        return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values, one tensor at a time, in the order of the file."""
        for name in self.entries:
            yield name, self.read(name)


def _index(entries: list[tuple[str, Entry]]) -> bytes:
    writer = ByteWriter()
    writer.varint(len(entries))
    last = b""
    for name, entry in entries:
        encoded = name.encode()
        pairs = zip(last, encoded, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(last), len(encoded)))
        last = encoded
        writer.varint(shared)
        writer.sized(encoded[shared:])
        writer.varint(DTYPES.index(entry.dtype))
        writer.varint(len(entry.shape))
        for size in entry.shape:
            writer.varint(size)
        writer.varint(entry.length)
        writer.raw(struct.pack("<I", entry.crc))
    return writer.getvalue()


def _entries(file: BinaryIO) -> dict[str, Entry]:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or start[:7] != MAGIC:
        raise DecodeError(f"it has {size} bytes and does not begin as a packed file does")
    _, version, at, length, crc = _HEADER.unpack(start)
    if not 1 <= version <= VERSION:
        raise DecodeError(f"it has format version {version}, this Secateur reads 1 to {VERSION}: update Secateur to load it")
    if length > INDEX_CAP:
        raise DecodeError(f"it announces an index of {length} bytes; at most {INDEX_CAP} are read")
    if at < _HEADER.size or at + length != size:
        what = "truncated" if at + length > size else "changed"
        raise DecodeError(f"its index should end at byte {at + length} and the file has {size}: it is {what}")
    file.seek(at)
    index = file.read(length)
    if zlib.crc32(index) != crc:
        raise DecodeError("its index does not match its checksum: it was damaged or changed")
    return _parsed(ByteReader(index), at, size)


def _parsed(reader: ByteReader, end: int, size: int) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    at, values, last = _HEADER.size, 0, b""
    for _ in range(reader.varint()):
        shared = reader.varint(len(last) + 1)
        last = last[:shared] + bytes(reader.sized())
        try:
            name = last.decode()
        except UnicodeDecodeError:
            raise DecodeError("the name of a tensor is not UTF-8") from None
        dtype = DTYPES[reader.varint(len(DTYPES))]
        shape = tuple(reader.varint(2**40) for _ in range(reader.varint(65)))
        length = reader.varint()
        crc = struct.unpack("<I", reader.raw(4))[0]
        if name in found:
            raise DecodeError(f"the tensor {name[:200]!r} is there twice")
        if math.prod(max(d, 1) for d in shape) >= 2**56:
            raise DecodeError(f"the tensor {name[:200]!r} has an impossible shape: {str(shape)[:200]}")
        found[name] = Entry(dtype, shape, at, length, crc)
        at += length
        values += math.prod(shape)
        if at > end:
            raise DecodeError(f"the tensor {name[:200]!r} ends at byte {at}, the tensors at {end}")
        if values > FREE_VALUES + VALUES_PER_BYTE * size:
            raise DecodeError(f"its tensors would have more than {values} values, too many for a file of {size} bytes")
    reader.end()
    return found
