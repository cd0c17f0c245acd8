from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur import select


def brute_top(scores: np.ndarray, keep: list[int]) -> np.ndarray:
    """Sort each row by (score descending, index ascending) and keep the first ones."""
    mask = np.zeros(scores.shape, dtype=bool)
    for row, k in enumerate(keep):
        order = sorted(range(scores.shape[1]), key=lambda i: (-scores[row, i], i))
        mask[row, order[:k]] = True
    return mask


@st.composite
def problems(draw):
    groups, units = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from([1, 2, 3, 1000]))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    scores = (rng.integers(-levels, levels + 1, (groups, units)) / 7).astype(np.float32)
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.2] = -np.inf
    keep = [draw(st.integers(0, units)) for _ in range(groups)]
    return scores, keep


@given(problems())
def test_top_equals_brute_force_with_ties_broken_by_index(problem):
    scores, keep = problem
    mask = select.top(torch.tensor(scores), torch.tensor(keep))
    assert (mask.numpy() == brute_top(scores, keep)).all()


@pytest.mark.parametrize("levels", [0, 1, 3, 10**6])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99999])
def test_large_group_equals_stable_sort(levels, sparsity):
    """Above the size where counting replaces sorting, signed scores, ties of every weight."""
    n = select._SMALL_TOTAL * 3 + 17
    gen = torch.Generator().manual_seed(levels)
    scores = torch.randint(-levels, levels + 1, (n,), generator=gen).float() / 3
    keep = n - select.removed_count(n, sparsity)
    mask = select.top(scores[None], torch.tensor([keep]))[0]
    expected = torch.zeros(n, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:keep]] = True
    assert torch.equal(mask, expected)


@given(st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=30), min_size=1, max_size=6), st.data())
def test_split_counts_equals_one_stable_sort_of_everything(lists, data):
    parts = [torch.tensor(p).float() / 3 for p in lists]
    everything = torch.cat(parts)
    keep = data.draw(st.integers(0, len(everything)))
    kept = everything.sort(descending=True, stable=True).indices[:keep]
    owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(p) for p in parts]))
    assert select.split_counts(lambda: parts, keep) == torch.bincount(owner[kept], minlength=len(parts)).tolist()


@pytest.mark.parametrize("distribution", ["normal", "few levels", "sorted", "periodic", "one outlier"])
def test_guess_and_counting_agree_on_distributions_that_mislead_a_sample(distribution):
    n = 3_000_000
    gen = torch.Generator().manual_seed(1)
    values = torch.randn(n, generator=gen)
    if distribution == "few levels":
        values = (values * 2).round()
    elif distribution == "sorted":
        values = values.sort().values
    elif distribution == "periodic":  # every sampled place holds the same value
        values[:: select._STEP] = 7.0
    elif distribution == "one outlier":
        values = torch.zeros(n)
        values[n // 3] = 1.0
    for k in (1, 2, n // 10, n // 2, n - 1, n):
        assert select.kth_largest(lambda: [values], k) == select._by_counting(lambda: [values], k)
        assert select.kth_largest(lambda: values.split(1_000_001), k) == float(values.kthvalue(n - k + 1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kth_largest_is_exact_at_every_rank_of_awkward_values(dtype):
    values = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, float("-inf"), 1.0, 1.0000001, -1.0, float("inf"), 1 + 1e-16, 5e-324]
    values = torch.tensor(values, dtype=dtype)
    ordered = values.sort(descending=True).values
    assert [select.kth_largest(lambda: [values], k + 1) for k in range(len(values))] == ordered.tolist()
    assert [select._by_counting(lambda: [values], k + 1) for k in range(len(values))] == ordered.tolist()


@pytest.mark.parametrize("levels", [3, 10**6])
def test_float64_is_told_apart_where_float32_is_not(levels):
    n = select._SMALL_TOTAL * 2
    gen = torch.Generator().manual_seed(0)
    scores = 1 + torch.randint(levels, (n,), generator=gen).double() * 1e-15
    mask = select.top(scores[None], torch.tensor([n // 3]))[0]
    expected = torch.zeros(n, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[: n // 3]] = True
    assert torch.equal(mask, expected)


def test_counts_are_the_nearest_whole_number_and_are_spread_evenly():
    assert [select.removed_count(10, s) for s in (0.0, 0.04, 0.05, 0.7, 0.96)] == [0, 0, 1, 7, 10]
    assert select.spread(7, 3).tolist() == [3, 2, 2]
    assert select.spread(0, 2).tolist() == [0, 0]


def test_a_count_out_of_range_is_refused():
    with pytest.raises(ValueError, match="between 0 and 3"):
        select.top(torch.zeros(1, 3), torch.tensor([4]))
