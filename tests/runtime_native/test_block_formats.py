from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import LayerError
from secateur.runtime.formats.block import Blocks, from_blocks, stored_fraction, to_blocks
from secateur.runtime.semi_structured import breaks_two_of_four


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.floats(0, 1))
def test_there_and_back(tall, wide, rows, cols, density):
    dense = torch.randn(tall * rows, wide * cols) * (torch.rand(tall * rows, wide * cols) < density)
    blocks = to_blocks(dense, rows, cols)
    assert torch.equal(from_blocks(blocks), dense)
    if dense.numel():
        assert stored_fraction(dense, rows, cols) == pytest.approx(len(blocks.indices) / (tall * wide))


def test_bad_blocks_are_refused():
    with pytest.raises(LayerError, match="divide"):
        to_blocks(torch.zeros(5, 4), 2, 2)
    good = to_blocks(torch.eye(4), 2, 2)
    with pytest.raises(LayerError, match="columns"):
        from_blocks(good._replace(indices=good.indices + 2))
    with pytest.raises(LayerError, match="rise"):
        from_blocks(Blocks(good.indptr.flip(0), *good[1:]))


def test_two_of_four():
    assert breaks_two_of_four(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 3]])) is None
    assert breaks_two_of_four(torch.tensor([[1.0, 1, 2, 0]])).startswith("1 of 1 groups")
    assert "shape" in breaks_two_of_four(torch.zeros(2, 10))
