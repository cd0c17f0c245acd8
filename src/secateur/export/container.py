"""The safetensors file: written as a stream with its hash, read only after its header has proved harmless.

The library of that name keeps all tensors in memory to write them, and spent 11 s and 460 MB on a header of 80 MB; the
format is so small that checking and streaming it ourselves is the simpler way. Any safetensors reader opens these files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ArtifactError
from secateur.opened import Opened
from secateur.progress import advance
from secateur.runtime.formats.bitmask import words

HEADER_CAP = 10_000_000  #: bytes of JSON header that are read at most
_BLOCK = 1 << 22  # bytes hashed and written at a time

#: safetensors' name of every dtype a file can hold.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """One tensor to write. `make` is called when its turn comes, so that only one is in memory at a time."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `begin` to `end` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def file_bytes(parts: Sequence[Part]) -> int:
    """Size of the file that `write` makes of `parts`."""
    return len(_header(_ordered(parts))) + sum(p.nbytes for p in parts)


def write(path: Path, parts: Sequence[Part], metadata: Mapping[str, str] | None = None) -> str:
    """Write and sync a safetensors file; returns its SHA-256. The same parts and metadata make the same bytes."""
    parts = _ordered(parts)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        header = _header(parts, metadata)
        file.write(header)
        digest.update(header)
        advance("saving", 0, len(parts))
        for done, part in enumerate(parts, 1):
            tensor = part.make()
            if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
                raise AssertionError(f"part {part.key!r}: made {tensor.dtype} {tuple(tensor.shape)}, announced {part}")
            data = raw_bytes(tensor)
            for start in range(0, len(data), _BLOCK):
                block = data[start : start + _BLOCK]
                file.write(block)
                digest.update(block)
            advance("saving", done, len(parts), part.key)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, sharing the memory of a contiguous one on the CPU."""
    return np.ascontiguousarray(words(tensor)).view(np.uint8).data


def hash_file(file: BinaryIO) -> str:
    """SHA-256 of an open file, from its beginning."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


class Container(Opened):
    """A safetensors file opened for reading. `entries` says what is in it; `read` gets one tensor.

    `name` is the file's name in error messages. Raises ArtifactError where the header is not exactly what the format
    allows: too long, no JSON, unknown dtypes, offsets that overlap or leave holes, sizes that do not match.
    """

    buffering = 0

    def __init__(self, file: BinaryIO, name: str):
        super().__init__(file, name)
        self.entries = _entries(file, name)

    def read(self, key: str) -> Tensor:
        """The tensor `key`, in memory of its own."""
        entry = self.entries.get(key)
        if entry is None:
            raise ArtifactError(f"{self.name} has no tensor {key!r}")
        raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        into = raw.numpy().data
        self.file.seek(entry.begin)
        while into:
            got = self.file.readinto(into)  # type: ignore[attr-defined]
            if not got:
                raise ArtifactError(f"{self.name} ends in the middle of the tensor {key!r}; the file is truncated")
            into = into[got:]
        if entry.dtype == torch.bool and raw.numel() and int(raw.max()) > 1:
            raise ArtifactError(f"{self.name}: the bool tensor {key!r} holds bytes other than 0 and 1")
        return raw.view(entry.dtype).reshape(entry.shape)


def elements(shape: Sequence[int]) -> int | None:
    """Number of elements of `shape`, or None where no tensor can have it because a stride would overflow 63 bits."""
    return math.prod(shape) if math.prod(max(d, 1) for d in shape) < 2**56 and len(shape) <= 64 else None


def parse_json(text: bytes, what: str, *, containers: int) -> Any:
    """Strict JSON with at most `containers` lists and objects, no repeated keys and no NaN. Raises ArtifactError."""
    if text.count(b"{") + text.count(b"[") > containers:
        raise ArtifactError(f"{what} holds more than {containers} lists and objects; it is not one of ours, or damaged")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ArtifactError(f"{what} is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
        raise ArtifactError(f"{what} is not valid JSON: {str(error)[:200]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _ordered(parts: Sequence[Part]) -> list[Part]:
    """Widest dtype first: every tensor then lies at a multiple of its element size, as memory-mapping readers need."""
    return sorted(parts, key=lambda part: -part.dtype.itemsize)


def _header(parts: Sequence[Part], metadata: Mapping[str, str] | None = None) -> bytes:
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for part in parts:
        span = [offset, offset + part.nbytes]
        table[part.key] = {"dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": span}
        offset += part.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_CAP:
        raise ArtifactError(f"the names of {len(parts)} tensors need a header of {len(text)} bytes; {HEADER_CAP} are allowed")
    return struct.pack("<Q", len(text)) + text


def _entries(file: BinaryIO, name: str) -> dict[str, Entry]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise ArtifactError(f"{name} has {size} bytes and no safetensors header; it is truncated or another kind of file")
    (length,) = struct.unpack("<Q", start)
    if length > HEADER_CAP:
        raise ArtifactError(f"{name} announces a header of {length} bytes; at most {HEADER_CAP} are read")
    if length > size - 8:
        raise ArtifactError(f"{name} announces a header of {length} bytes but has {size} in all; the file is truncated")
    table = parse_json(file.read(length), f"the header of {name}", containers=HEADER_CAP // 20)
    if not isinstance(table, dict):
        raise ArtifactError(f"the header of {name} is a {type(table).__name__}; expected an object")
    table.pop("__metadata__", None)
    found = {key: _entry(name, key, value, 8 + length) for key, value in table.items()}
    at = 8 + length
    for key, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            raise ArtifactError(f"{name}: the tensor {key!r} {what} (it begins at byte {entry.begin}, expected {at})")
        at = entry.end
    if at != size:
        what = "the file is truncated" if at > size else "something was appended"
        raise ArtifactError(f"{name}: its tensors end at byte {at}, the file has {size}: {what}")
    return found


def _entry(name: str, key: str, value: Any, base: int) -> Entry:
    """One entry of a header, checked for itself."""
    where = f"{name}: the tensor {key[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise ArtifactError(f"{where} has the unknown dtype {str(value['dtype'])[:40]!r}. Known: {', '.join(DTYPES)}.")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{where} must have a shape and two data_offsets of whole numbers")
    count = elements(shape)
    if count is None:
        raise ArtifactError(f"{where} has an impossible shape: {str(shape)[:200]}")
    begin, end = offsets
    if end - begin != count * dtype.itemsize:
        raise ArtifactError(f"{where} has {end - begin} bytes; its shape {str(shape)[:200]} needs {count * dtype.itemsize}")
    return Entry(dtype, tuple(shape), base + begin, base + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
