from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import LayerError
from secateur.runtime.formats.block import Blocks, from_blocks, stored_fraction, to_blocks
from secateur.runtime.formats.two_four import breaks_two_of_four, from_two_four, to_two_four


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


@given(st.integers(0, 4), st.integers(0, 6), st.floats(0, 1), st.integers(0, 100))
def test_two_four_there_and_back(rows, groups, density, seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, groups, 4, generator=g).argsort(dim=2)
    keep = (order < 2) & (torch.rand(rows, groups, 4, generator=g) < density)
    dense = (torch.randn(rows, groups, 4, generator=g) * keep).reshape(rows, 4 * groups)
    form = to_two_four(dense)
    assert form.values.shape == (rows, 2 * groups)
    assert torch.equal(from_two_four(form), dense)


def test_what_is_not_two_four_is_refused():
    with pytest.raises(LayerError, match="more than 2"):
        to_two_four(torch.ones(2, 8))
    form = to_two_four(torch.tensor([[1.0, 0, 2, 0]]))
    with pytest.raises(LayerError, match="ascend"):
        from_two_four(form._replace(positions=torch.tensor([[0b0110]], dtype=torch.uint8)))
    with pytest.raises(LayerError, match="two for each"):
        from_two_four(form._replace(values=form.values[:, :1]))
