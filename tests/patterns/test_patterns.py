from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import PatternError, RecipeError, UnknownName
from secateur.patterns import PATTERNS, make_pattern, reduce

SHAPES = [(4, 8), (8, 4, 3, 3), (4, 12, 5), (4, 4, 1, 2, 3), (1, 4), (4, 1)]
SPECS = ["element", "row", "neuron", "2:4", "1:4", "4x1", "1x4", "2x2", {"name": "n:m", "keep": 4, "of": 8}]


@pytest.mark.parametrize(("spec", "shape"), [*itertools.product(SPECS, SHAPES)])
def test_unfold_inverts_fold(spec, shape):
    """Every element lies in exactly one unit, and a unit's keep bit reaches just its elements."""
    pattern = make_pattern(spec)
    size = torch.Size(shape)
    if pattern.refuses(size):
        assert spec not in ("element", "row")
        return
    index = torch.arange(size.numel(), dtype=torch.float32).reshape(size)
    folded = pattern.fold(index)
    assert sorted(folded.flatten().tolist()) == sorted(index.flatten().tolist())
    keep = torch.rand(folded.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.5
    mask = pattern.unfold(keep, size)
    assert mask.shape == size
    assert mask.dtype == torch.bool
    expected = {int(e) for g, u in keep.nonzero().tolist() for e in folded[g, u]}
    assert {int(i) for i in index[mask]} == expected


def test_n_of_m_groups_run_along_the_inputs_at_each_kernel_position():
    weight = torch.arange(2 * 4 * 2 * 2.0).reshape(2, 4, 2, 2)
    groups = make_pattern("2:4").fold(weight)
    assert groups.shape == (8, 4, 1)
    assert groups[0, :, 0].tolist() == weight[0, :, 0, 0].tolist()
    assert groups[1, :, 0].tolist() == weight[0, :, 0, 1].tolist()


def test_blocks_are_rectangles_of_the_weight_matrix():
    weight = torch.arange(16.0).reshape(4, 4)
    blocks = make_pattern("2x2").fold(weight)
    assert blocks[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(("spec", "shape", "what"), [("2:4", (3, 10), "10 input features"), ("4x1", (6, 8), "6 x 8")])
def test_a_ragged_tail_is_refused_with_the_shape(spec, shape, what):
    pattern = make_pattern(spec)
    with pytest.raises(PatternError, match=what):
        pattern.fold(torch.zeros(shape))


def test_keep_of_means_keep():
    pattern = make_pattern("1:4")
    assert pattern.sparsity == 0.75


@pytest.mark.parametrize("spec", ["4:2", "0:4", {"name": "n:m", "keep": 2.0}, {"name": "n:m", "keep": True}, "2:1000", "0x4"])
def test_impossible_patterns_are_refused(spec):
    with pytest.raises(RecipeError):
        make_pattern(spec)


def test_misspelt_names_and_options_suggest_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'element'"):
        make_pattern("elemnt")
    with pytest.raises(RecipeError, match="Did you mean 'rows'"):
        make_pattern({"name": "block", "row": 4})
    with pytest.raises(RecipeError, match="needs a 'name'"):
        make_pattern({"rows": 4})


def test_every_registered_pattern_says_where_it_comes_from():
    for entry in PATTERNS.values():
        assert entry.source
        assert entry.summary


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_reductions_against_plain_loops(groups, units, elements, seed):
    folded = torch.randn(groups, units, elements, generator=torch.Generator().manual_seed(seed))
    plain = {
        "sum": lambda e: sum(e),
        "mean": lambda e: sum(e) / len(e),
        "l2": lambda e: sum(x * x for x in e) ** 0.5,
        "max": max,
        "abs_sum": lambda e: abs(sum(e)),
    }
    for name, rule in plain.items():
        expected = torch.tensor([[rule(u) for u in g] for g in folded.double().tolist()])
        torch.testing.assert_close(reduce(folded, name).double(), expected.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnknownName):
        reduce(folded, "median")
