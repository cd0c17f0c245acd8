"""Positions of kept weights: exact, the same with and without the compiled coder, and near the number of masks there are."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest

from secateur.coding import positions
from secateur.coding.bits import ByteReader, DecodeError
from secateur.coding.context import decode_mask, encode_mask
from secateur.coding.kernels import numpy_only

MODES = ("gaps", "context", "auto")


def uneven(shape, density, seed=0):
    """A mask whose rows and columns are differently full, as in pruned networks."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(0.5, 1, shape[0])[:, None] * rng.gamma(0.5, 1, shape[1])
    return rng.random(shape) < share * density / share.mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "density"), [((1, 1), 1.0), ((1, 9), 0.4), ((40, 30), 0.0), ((40, 30), 1.0), ((60, 90), 0.03)]
)
def test_positions_come_back_and_both_coders_agree(mode, shape, density):
    mask = np.random.default_rng(0).random(shape) < density
    made = positions.encode(mask, positions=mode)
    for pure in (False, True):
        if pure:
            with numpy_only():
                assert positions.encode(mask, positions=mode) == made
                found = positions.decode(ByteReader(made), shape)
        else:
            found = positions.decode(ByteReader(made), shape)
        assert np.array_equal(found, np.flatnonzero(mask))


def test_distances_beyond_a_padding():
    mask = np.zeros((1, 5000), np.bool_)
    mask[0, [0, 255, 256, 512, 4999]] = True  # distances 0, 254, 0, 255, 4486
    assert np.array_equal(
        positions.decode(ByteReader(positions.encode(mask, positions="gaps")), mask.shape), np.flatnonzero(mask)
    )


def test_the_bound_counts_masks():
    assert positions.bound_bits(10, 3) == pytest.approx(math.log2(120))
    assert positions.bound_bits(7, 0) == positions.bound_bits(7, 7) == pytest.approx(0, abs=1e-9)
    assert positions.row_bound_bits(np.eye(4, dtype=bool)) == pytest.approx(4 * math.log2(4))


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5])
def test_even_masks_take_within_5_percent_of_the_bound(density):
    mask = np.random.default_rng(3).random((300, 400)) < density
    bound = positions.bound_bits(mask.size, int(mask.sum()))
    assert bound < 8 * len(positions.encode(mask)) < 1.05 * bound


def test_uneven_masks_take_less_than_the_bound():
    mask = uneven((300, 784), 0.02)
    bound = positions.bound_bits(mask.size, int(mask.sum()))
    context, gaps = (8 * len(positions.encode(mask, positions=m)) for m in ("context", "gaps"))
    assert context < 0.8 * bound
    assert context < 0.8 * gaps
    assert len(positions.encode(mask)) * 8 == context


def test_positions_beyond_the_end_are_refused():
    made = positions.encode(np.ones((3, 7), np.bool_), positions="gaps")
    with pytest.raises(DecodeError, match=r"beyond|out of range"):
        positions.decode(ByteReader(made), (3, 6))


@pytest.mark.parametrize("pure", [False, True])
def test_a_context_stream_with_bytes_left_over_is_refused(pure):
    mask = uneven((20, 20), 0.2)
    made = encode_mask(mask, 9000)
    assert np.array_equal(decode_mask(made, mask.shape, 9000), mask)
    with pytest.raises(DecodeError, match="before their stream"), numpy_only() if pure else nullcontext():
        decode_mask(made + b"\xaa" * 60, mask.shape, 9000)
