"""LAMP's arithmetic against its definition, term by term."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur import lamp as module
from secateur.criteria import CRITERIA
from secateur.lamp import lamp_scores
from secateur.types import LayerStats


def by_definition(squared: torch.Tensor) -> torch.Tensor:
    values, found = squared.double().tolist(), []
    for u, value in enumerate(values):
        kept = sum(v for i, v in enumerate(values) if v > value or (v == value and i <= u))
        found.append(value / kept if kept else 0.0)
    return torch.tensor(found, dtype=torch.float32)


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 1e-6, 3.0, 7.5]), max_size=30))
def test_definition_under_ties(values):
    squared = torch.tensor(values)
    torch.testing.assert_close(lamp_scores(squared), by_definition(squared))


@given(st.integers(1, 40), st.integers(1, 50))
def test_chunks_change_nothing(size, chunk):
    squared = torch.randn(size, generator=torch.Generator().manual_seed(size)).square()
    whole, usual = lamp_scores(squared), module._CHUNK
    module._CHUNK = chunk
    try:
        assert torch.equal(lamp_scores(squared), whole)
    finally:
        module._CHUNK = usual


def test_ranks_as_magnitude_and_the_lower_of_equals_is_kept():
    weight = torch.tensor([1.0, -2, 2, 0, 1, -1])
    assert lamp_scores(weight.square()).argsort(descending=True).tolist() == [1, 2, 0, 4, 5, 3]


def test_the_largest_weight_scores_one_whatever_the_scale():
    for scale in (1e-30, 1.0, 1e30):
        score = CRITERIA["lamp"].make(LayerStats("w", torch.tensor([[1.0, -2.0], [0.0, 0.5]]) * scale))
        torch.testing.assert_close(score, torch.tensor([[1 / 5, 1.0], [0.0, 0.25 / 5.25]]))


def test_zeros_score_zero_and_other_shapes_are_refused():
    assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]
    assert lamp_scores(torch.zeros(0)).shape == (0,)
    with pytest.raises(ValueError, match="flat"):
        lamp_scores(torch.zeros(2, 2))
