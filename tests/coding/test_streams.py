"""Streams of symbols: the same bytes with and without the compiled coders, back again, and near the entropy."""

from __future__ import annotations

import heapq
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.coding import huffman, rans, streams
from secateur.coding.bits import ByteReader, ByteWriter, DecodeError
from secateur.coding.kernels import compiled, numpy_only


def drawn(count, alphabet, seed=0):
    rng = np.random.default_rng(seed)
    return rng.choice(alphabet, count, p=rng.dirichlet(np.full(alphabet, 0.3))).astype(np.uint16)


@pytest.mark.parametrize("entropy", ["rans", "huffman", "auto"])
@pytest.mark.parametrize(("count", "alphabet"), [(0, 2), (1, 5), (2, 2), (700, 3), (9000, 17), (40000, 500)])
def test_both_ways_write_the_same_bytes_and_read_them(entropy, count, alphabet):
    symbols = drawn(count, alphabet)
    made = streams.encode(symbols, entropy)
    with numpy_only():
        assert compiled() is None
        assert streams.encode(symbols, entropy) == made
        reader = ByteReader(made)
        assert np.array_equal(streams.decode(reader, count), symbols)
        reader.end()
    assert np.array_equal(streams.decode(ByteReader(made), count), symbols)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=300), st.sampled_from(["rans", "huffman"]))
def test_any_symbols_come_back(symbols, entropy):
    symbols = np.array(symbols, np.uint16)
    assert np.array_equal(streams.decode(ByteReader(streams.encode(symbols, entropy)), len(symbols)), symbols)


def test_rans_is_within_a_half_percent_of_the_entropy_and_huffman_within_its_known_gap():
    symbols = np.random.default_rng(1).choice(4, 200_000, p=[0.9, 0.05, 0.03, 0.02]).astype(np.uint16)
    bound = streams.entropy_bits(np.bincount(symbols))
    assert bound <= 8 * len(streams.encode(symbols, "rans")) <= 1.005 * bound
    assert 1.5 * bound < 8 * len(streams.encode(symbols, "huffman")) < bound + len(symbols)  # at least a bit a symbol


def test_entropy_of_a_known_distribution():
    assert streams.entropy_bits(np.array([4, 2, 1, 1])) == pytest.approx(8 * 1.75)
    assert streams.entropy_bits(np.array([7])) == 0.0


def best_cost(counts):
    """Bits of an optimal prefix code: the sum of all merges."""
    heap = [int(c) for c in counts]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_huffman_is_optimal_and_canonical(seed):
    counts = np.random.default_rng(seed).integers(0, 50, 40)
    lengths = huffman.lengths_of(counts)
    assert (lengths * counts).sum() == best_cost(counts[counts > 0])
    codes = huffman.codes_of(lengths)
    words = sorted((int(n), int(c)) for n, c in zip(lengths, codes, strict=True) if n)
    assert words[0][1] == 0
    for (n, c), (m, d) in itertools.pairwise(words):
        assert d == (c + 1) << (m - n)


def test_huffman_of_extreme_counts_stays_within_15_bits():
    counts = np.array([2**i for i in range(40)])
    lengths = huffman.lengths_of(counts)
    assert lengths.max() == 15
    assert (2.0 ** -lengths.astype(float)).sum() == 1.0


@pytest.mark.parametrize("counts", [[1, 10**9], [1] * 4096, [5, 0, 0, 3], [10**6, 1, 1, 1]])
def test_frequencies_add_up_and_no_symbol_vanishes(counts):
    counts = np.array(counts)
    freqs, bits = rans.normalised(counts)
    assert int(freqs.sum(dtype=int)) == 1 << bits
    assert np.array_equal(freqs > 0, counts > 0)


@pytest.mark.parametrize("pure", [False, True])
def test_one_wrong_bit_is_found_by_rans_and_survived_by_huffman(pure):
    symbols = drawn(300, 9)
    rng = np.random.default_rng(0)
    for entropy in ("rans", "huffman"):
        good = streams.encode(symbols, entropy)
        found = 0
        for _ in range(60):
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
            with numpy_only() if pure else nullcontext():
                try:
                    assert len(streams.decode(ByteReader(bytes(bad)), 300)) == 300
                except DecodeError:
                    found += 1
        assert found >= (58 if entropy == "rans" else 1)  # Huffman falls into step again; the file's checksum is its guard


@pytest.mark.parametrize("cut", [0, 1, 5, 20, 200])
def test_a_cut_stream_is_refused(cut):
    for entropy in ("rans", "huffman"):
        with pytest.raises(DecodeError):
            streams.decode(ByteReader(streams.encode(drawn(3000, 9), entropy)[:cut]), 3000)


@given(st.lists(st.integers(0, 2**63 - 1), max_size=20))
def test_numbers_come_back(values):
    writer = ByteWriter()
    for value in values:
        writer.varint(value)
    reader = ByteReader(writer.getvalue())
    assert [reader.varint() for _ in values] == values
    reader.end()


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 20])
def test_numbers_that_do_not_end_are_refused(data):
    with pytest.raises(DecodeError):
        ByteReader(data).varint()
