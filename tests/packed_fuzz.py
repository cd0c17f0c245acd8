"""Damaged packed files: raw damage, which checksums find, and damage under right checksums, which the decoders must survive."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator, Sequence


def mutants(good: Sequence[bytes], rng: random.Random, count: int) -> Iterator[bytes]:
    """`count` damaged files: a third plain, a third with the index's checksum put right, a third with the tensors' too."""
    for i in range(count):
        data = damaged(bytearray(rng.choice(good)), rng)
        yield data if i % 3 == 0 else repaired(data, tensors=i % 3 == 2)


def damaged(data: bytearray, rng: random.Random) -> bytes:
    """Bits flipped, bytes set to extremes, pieces cut out, doubled or moved, the end cut off."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        if len(data) < 30:
            break
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 127, 128, 255))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 12))
        else:
            del data[at:]
    return bytes(data)


def repaired(data: bytes, *, tensors: bool) -> bytes:
    """The file with checksums that agree with what is there, as someone who means harm would send it."""
    if len(data) < 24:
        return data
    at = min(struct.unpack("<Q", data[8:16])[0], len(data))
    index = bytearray(data[at:])
    if tensors:
        _forge_tensors(index, data)
    header = struct.pack("<7sBQII", b"SECPACK", 1, at, len(index), zlib.crc32(bytes(index)))
    return header + data[24:at] + bytes(index)


def _forge_tensors(index: bytearray, data: bytes) -> None:
    """Walk the index as far as it makes sense, and put each tensor's checksum right."""
    at, begin = 0, 24

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = index[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                return value

    try:
        for _ in range(number()):
            number()
            at += number()
            number()
            for _ in range(min(number(), 100)):
                number()
            length = number()
            index[at : at + 4] = struct.pack("<I", zlib.crc32(data[begin : begin + length]))
            at += 4
            begin += length
    except IndexError:
        return
