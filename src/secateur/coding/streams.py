"""A stream of symbols with its own table: which code, the table, the bits. Also how near the bits are to the entropy."""

from __future__ import annotations

from typing import Literal

import numpy as np

from secateur.coding import huffman, rans
from secateur.coding.bits import ByteReader, ByteWriter, DecodeError

#: "rans" is the default and the nearest to the entropy; "huffman" is the paper's; "auto" takes the smaller.
Entropy = Literal["auto", "rans", "huffman"]
ENTROPIES: tuple[Entropy, ...] = ("auto", "rans", "huffman")
MAX_ALPHABET = 4096
_CONSTANT, _RANS, _HUFFMAN = range(3)


def entropy_bits(counts: np.ndarray) -> float:
    """Bits that symbols with these counts need at least where each is coded by its share alone (Shannon 1948)."""
    found = counts[counts > 0].astype(np.float64)
    return float((found * np.log2(found.sum() / found)).sum()) if len(found) > 1 else 0.0


def encode(symbols: np.ndarray, entropy: Entropy = "rans") -> bytes:
    """``symbols uint16 [n]``, below 4096 -> bytes that `decode` reads, given n."""
    counts = np.bincount(symbols) if len(symbols) else np.zeros(1, np.int64)
    if np.count_nonzero(counts) <= 1:
        writer = ByteWriter()
        writer.varint(_CONSTANT)
        writer.varint(int(symbols[0]) if len(symbols) else 0)
        return writer.getvalue()
    if len(counts) > MAX_ALPHABET:
        raise ValueError(f"a stream has at most {MAX_ALPHABET} symbols, got {len(counts)}")
    made = []
    if entropy in ("auto", "rans"):
        made.append(_with_rans(symbols, counts))
    if entropy in ("auto", "huffman"):
        made.append(_with_huffman(symbols, counts))
    return min(made, key=len)


def decode(reader: ByteReader, count: int) -> np.ndarray:
    """The `count` symbols that `encode` wrote, ``uint16 [count]``. Raises DecodeError for anything else."""
    method = reader.varint(3)
    if method == _CONSTANT:
        return np.full(count, reader.varint(MAX_ALPHABET), np.uint16)
    if method == _RANS:
        bits = reader.varint(rans.MAX_BITS + 1)
        freqs = np.array([reader.varint(1 << 16) for _ in range(_alphabet(reader))], np.uint16)
        return rans.decode(reader.sized(), freqs, bits, count)
    alphabet = _alphabet(reader)
    packed = np.frombuffer(reader.raw(-(-alphabet // 2)), np.uint8)
    lengths = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:alphabet]
    return huffman.decode(reader.sized(), np.ascontiguousarray(lengths), count)


def _alphabet(reader: ByteReader) -> int:
    alphabet = reader.varint(MAX_ALPHABET + 1)
    if alphabet == 0:
        raise DecodeError("a table of symbols is empty")
    return alphabet


def _with_rans(symbols: np.ndarray, counts: np.ndarray) -> bytes:
    writer = ByteWriter()
    freqs, bits = rans.normalised(counts)
    writer.varint(_RANS)
    writer.varint(bits)
    writer.varint(len(freqs))
    for freq in freqs.tolist():
        writer.varint(freq)
    writer.sized(rans.encode(symbols, freqs, bits))
    return writer.getvalue()


def _with_huffman(symbols: np.ndarray, counts: np.ndarray) -> bytes:
    writer = ByteWriter()
    lengths = huffman.lengths_of(counts)
    writer.varint(_HUFFMAN)
    writer.varint(len(lengths))
    even = np.append(lengths, 0)[: 2 * -(-len(lengths) // 2)].reshape(-1, 2)
    writer.raw((even[:, 0] | even[:, 1] << 4).astype(np.uint8))
    writer.sized(huffman.encode(symbols, lengths))
    return writer.getvalue()
