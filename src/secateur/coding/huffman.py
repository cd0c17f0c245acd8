"""Canonical Huffman codes (Huffman 1952; Schwartz and Kallick 1964), at most 15 bits long: the third stage of the paper.

Codes of one length are consecutive numbers in the order of the symbols, so that the lengths say everything. The longest
is limited by package-merge (Larmore and Hirschberg 1990), which is optimal under the limit.
"""

from __future__ import annotations

import numpy as np

from secateur.coding.bits import DecodeError
from secateur.coding.kernels import compiled

MAX_LENGTH = 15


def lengths_of(counts: np.ndarray) -> np.ndarray:
    """``counts [symbols]`` -> lengths uint8 in bits, 0 where a symbol does not occur. One symbol alone has length 1."""
    present = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.uint8)
    if len(present) == 1:
        lengths[present] = 1
        return lengths
    if len(present) > 1 << MAX_LENGTH:
        raise ValueError(f"{len(present)} symbols do not fit into codes of {MAX_LENGTH} bits")
    order = present[np.argsort(counts[present], kind="stable")]
    coins: list[tuple[int, tuple[int, ...]]] = [(int(counts[s]), (int(s),)) for s in order]
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(MAX_LENGTH):
        merged = sorted(packages + coins, key=lambda coin: coin[0])
        packages = [(merged[i][0] + merged[i + 1][0], merged[i][1] + merged[i + 1][1]) for i in range(0, len(merged) - 1, 2)]
    for _, symbols in packages[: len(present) - 1]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def codes_of(lengths: np.ndarray) -> np.ndarray:
    """``lengths [symbols]`` -> canonical codes uint16. Raises DecodeError where no prefix code has these lengths."""
    if lengths.size == 0 or lengths.max() > MAX_LENGTH or not lengths.any():
        raise DecodeError("a Huffman table has no codes, or longer ones than 15 bits")
    if int((1 << (MAX_LENGTH - lengths[lengths > 0].astype(np.int64))).sum()) > 1 << MAX_LENGTH:
        raise DecodeError("the lengths of a Huffman table belong to no prefix code")
    codes = np.zeros(len(lengths), np.uint16)
    code = 0
    for length in range(1, MAX_LENGTH + 1):
        which = np.flatnonzero(lengths == length)
        codes[which] = code + np.arange(len(which))
        code = (code + len(which)) << 1
    return codes


def encode(symbols: np.ndarray, lengths: np.ndarray) -> bytes:
    """``symbols uint16 [n]`` -> bits, highest first, the last byte filled with zeros."""
    codes = codes_of(lengths)
    if (kernels := compiled()) is not None:
        return kernels.huffman_encode(symbols, lengths, codes).tobytes()
    size = lengths[symbols].astype(np.int64)
    ends = np.cumsum(size)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(MAX_LENGTH):
        has = size > place
        bits[ends[has] - 1 - place] = codes[symbols[has]] >> place & 1
    return np.packbits(bits).tobytes()


def decode(data: bytes | memoryview, lengths: np.ndarray, count: int) -> np.ndarray:
    """Bits -> ``symbols uint16 [count]``. Raises DecodeError where they are too many, too few, or no codes."""
    codes = codes_of(lengths)
    raw = np.frombuffer(data, np.uint8)
    if (kernels := compiled()) is not None:
        out = np.empty(count, np.uint16)
        try:
            kernels.huffman_decode(raw, lengths, codes, out)
        except ValueError as error:
            raise DecodeError(str(error)) from None
        return out
    return _decode(raw, lengths, codes, count)


def _decode(raw: np.ndarray, lengths: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Where would a code that starts at bit i end? Asked for every i at once; then only the chain of starts is followed."""
    symbol, length = np.zeros(1 << MAX_LENGTH, np.uint16), np.zeros(1 << MAX_LENGTH, np.uint8)
    for s in np.flatnonzero(lengths):
        free = MAX_LENGTH - int(lengths[s])
        first = int(codes[s]) << free
        symbol[first : first + (1 << free)], length[first : first + (1 << free)] = s, lengths[s]
    bits = np.concatenate([np.unpackbits(raw), np.zeros(MAX_LENGTH, np.uint8)]).astype(np.int32)
    windows = np.zeros(8 * len(raw), np.int32)
    for place in range(MAX_LENGTH):
        windows = windows << 1 | bits[place : place + len(windows)]
    steps = length[windows].tolist()
    starts, at = np.empty(count, np.int64), 0
    for i in range(count):
        if at >= len(steps) or steps[at] == 0:
            raise DecodeError("a stream is cut short, or holds bits that are no code")
        starts[i] = at
        at += steps[at]
    if at > 8 * len(raw) or -(-at // 8) != len(raw):
        raise DecodeError("a stream ends elsewhere than its symbols")
    return symbol[windows[starts]]
