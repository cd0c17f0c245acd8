"""Range asymmetric numeral systems (Duda 2013) over interleaved lanes (Giesen 2014): near the entropy, decoded in parallel.

Symbol i belongs to lane ``i mod lanes``. Each lane is a state of 32 bits that starts at 2^16 and gives away words of 16
bits when it grows too large: x -> (x div f) 2^bits + x mod f + start. The stream holds the last states and then the
words in the order in which the decoder asks for them: row by row of lanes, ascending. It has read all words and is back
at 2^16 in every lane when the last symbol is decoded, which checks the stream as a by-product.
"""

from __future__ import annotations

import numpy as np

from secateur.coding.bits import DecodeError
from secateur.coding.kernels import compiled

MAX_BITS = 15
_LOW = np.uint64(1 << 16)
_LANE_SYMBOLS = 16384  # symbols that pay for a lane's four bytes of state


def normalised(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """``counts [symbols]`` -> frequencies uint16 that add up to ``2^bits``, and `bits`. Symbols that occur keep at least 1.

    The largest remainders are rounded up; what is still missing or too much goes to where it costs the fewest bits.
    """
    present = int(np.count_nonzero(counts))
    total = int(counts.sum())
    bits = min(MAX_BITS, max(8 if total < 4096 else 12, int(present - 1).bit_length() + 3))
    size = 1 << bits
    if present == 1:
        return _single(counts, size), bits
    exact = counts * (size / total)
    freqs = np.where(counts > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := size - int(freqs.sum())) != 0:
        step = 1 if missing > 0 else -1
        able = (counts > 0) & (freqs + step >= 1) & (freqs + step < size)
        gain = np.where(able, counts * np.log2(np.maximum(freqs + step, 1) / np.maximum(freqs, 1)), -np.inf)
        best = np.argsort(-gain, kind="stable")[: min(abs(missing), int(able.sum()))]
        freqs[best] += step
    return freqs.astype(np.uint16), bits


def log_lanes(count: int) -> int:
    """How many lanes, as a power of two, a stream of `count` symbols has."""
    return max(0, min(12, (count // _LANE_SYMBOLS).bit_length()))


def encode(symbols: np.ndarray, freqs: np.ndarray, bits: int) -> bytes:
    """``symbols uint16 [n]`` -> stream. Every symbol must have a frequency."""
    lanes = log_lanes(len(symbols))
    if (kernels := compiled()) is not None:
        return kernels.rans_encode(symbols, freqs, bits, lanes).tobytes()
    return _encode(symbols, freqs, bits, 1 << lanes)


def decode(data: bytes | memoryview, freqs: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Stream -> ``symbols uint16 [count]``. Raises DecodeError where the stream does not fit."""
    if not 1 <= bits <= MAX_BITS or int(freqs.sum(dtype=np.int64)) != 1 << bits:
        raise DecodeError("the frequencies of a stream do not add up to their total")
    raw = np.frombuffer(data, np.uint8)
    if len(raw) < 4 << log_lanes(count) or len(raw) % 2:
        raise DecodeError("a stream is cut short")
    try:
        if (kernels := compiled()) is not None:
            out = np.empty(count, np.uint16)
            kernels.rans_decode(raw, freqs, bits, log_lanes(count), out)
            return out
        return _decode(raw, freqs, bits, 1 << log_lanes(count), count)
    except ValueError as error:
        raise DecodeError(str(error)) from None


def _single(counts: np.ndarray, size: int) -> np.ndarray:
    """One symbol alone takes no bits: its frequency is the total."""
    return np.where(counts > 0, size, 0).astype(np.uint16)


def _starts(freqs: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(freqs, dtype=np.uint64)])[:-1].astype(np.uint64)


def _encode(symbols: np.ndarray, freqs: np.ndarray, bits: int, lanes: int) -> bytes:
    freq, start = freqs.astype(np.uint64), _starts(freqs)
    states = np.full(lanes, _LOW, np.uint64)
    words: list[np.ndarray] = []
    for base in reversed(range(0, len(symbols), lanes)):
        piece = symbols[base : base + lanes]
        x, f = states[: len(piece)], freq[piece]
        full = x >= f << np.uint64(32 - bits)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(piece)] = ((x // f) << np.uint64(bits)) + x % f + start[piece]
    return states.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


def _decode(raw: np.ndarray, freqs: np.ndarray, bits: int, lanes: int, count: int) -> np.ndarray:
    symbol_of = np.repeat(np.arange(len(freqs), dtype=np.uint16), freqs)
    freq, start = freqs.astype(np.uint64), _starts(freqs)
    states = raw[: 4 * lanes].view("<u4").astype(np.uint64)
    words = raw[4 * lanes :].view("<u2").astype(np.uint64)
    out = np.empty(count, np.uint16)
    at, mask = 0, np.uint64((1 << bits) - 1)
    for base in range(0, count, lanes):
        x = states[: min(lanes, count - base)]
        slot = x & mask
        found = symbol_of[slot]
        out[base : base + len(x)] = found
        x = freq[found] * (x >> np.uint64(bits)) + slot - start[found]
        wants = x < _LOW
        more = int(np.count_nonzero(wants))
        if at + more > len(words):
            raise DecodeError("a stream is cut short")
        x[wants] = x[wants] << np.uint64(16) | words[at : at + more]
        at += more
        states[: len(x)] = x
    if at != len(words):
        raise DecodeError("a stream goes on after its last symbol")
    if (states != _LOW).any():
        raise DecodeError("a stream does not end as it began")
    return out
