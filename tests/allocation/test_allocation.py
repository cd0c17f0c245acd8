from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocation import ALLOCATIONS
from secateur.lamp import lamp_scores
from secateur.select import removed_count, top
from secateur.types import UnitScores


def layer(
    name: str, scores: torch.Tensor, elements: int = 1, shape: tuple[int, ...] | None = None, power: float = 2.0
) -> UnitScores:
    groups, units = scores.shape
    size = torch.Size(shape or (groups, units * elements))
    curve = {s: s**power for s in (0.25, 0.5, 0.75, 0.95)}
    return UnitScores(name, size, groups, units, elements, lambda: scores, curve, weigh=lambda: scores)


@st.composite
def networks(draw):
    elements = draw(st.sampled_from([1, 1, 4]))
    layers = {}
    for i in range(draw(st.integers(1, 5))):
        groups, units = draw(st.integers(1, 4)), draw(st.integers(1, 20))
        gen = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        levels = draw(st.sampled_from([1, 3, 1000]))
        scores = torch.randint(0, levels + 1, (groups, units), generator=gen).float() / levels
        layers[f"l{i}"] = layer(f"l{i}", scores, elements)
    return layers


@pytest.mark.parametrize("name", list(ALLOCATIONS))
@given(networks(), st.floats(0, 0.999))
def test_counts_are_possible_and_their_total_is_exact(name, layers, sparsity):
    counts = ALLOCATIONS[name].make(layers, sparsity)
    assert list(counts) == list(layers)
    for n, u in layers.items():
        assert counts[n].shape == (u.groups,)
        assert int(counts[n].min()) >= 0
        assert int(counts[n].max()) <= u.units
        assert int(counts[n].max() - counts[n].min()) <= 1, "groups of one layer share alike"
    kept = sum(int(c.sum()) for c in counts.values())
    total = sum(u.total for u in layers.values())
    if name == "uniform":
        assert kept == sum(u.total - removed_count(u.total, sparsity) for u in layers.values())
    elif name == "dynamic":  # groups are small here: from below, and no layer has room for one more unit in each group
        size = next(iter(layers.values())).elements
        budget = total * size - removed_count(total * size, sparsity)
        assert kept * size <= budget
        bins = len(layers) * max(1.0, budget / 10_000)
        assert all(
            int(c[0]) == u.units or (kept + u.groups) * size > budget - bins
            for c, u in zip(counts.values(), layers.values(), strict=True)
        )
    elif name in ("erk", "owl"):
        size = next(iter(layers.values())).elements
        missing = total * size - removed_count(total * size, sparsity)
        assert kept == -(-missing // size)
    else:
        assert kept == total - removed_count(total, sparsity)


@pytest.mark.parametrize("name", list(ALLOCATIONS))
@given(networks(), st.floats(0, 0.999), st.floats(0, 1))
def test_a_later_step_keeps_no_more_of_a_layer_than_is_left_of_it(name, layers, sparsity, first):
    """Some of each layer is gone, as an earlier step with other scores may have left it; the total is kept to all the same."""
    dense = ALLOCATIONS[name].make(layers, sparsity * first)
    gone = {}
    for i, (n, u) in enumerate(layers.items()):
        scores = torch.rand(u.groups, u.units, generator=torch.Generator().manual_seed(i)) ** (1 + 3 * i)
        gone[n] = layer(n, scores.masked_fill(~top(scores, dense[n]), -torch.inf), u.elements, power=1.0 + i)
    counts = ALLOCATIONS[name].make(gone, sparsity)
    for n, u in gone.items():
        assert int(counts[n].sum()) <= u.left
        kept = top(u.scores, counts[n])
        assert not bool((kept & torch.isneginf(u.scores)).any()), f"a removed unit of {n!r} came back"
    total = sum(u.total * u.elements for u in gone.values())
    kept = sum(int(counts[n].sum()) * u.elements for n, u in gone.items())
    size = next(iter(gone.values())).elements
    if name in ("global", "lamp", "erk", "owl"):
        assert abs(kept - (total - removed_count(total, sparsity))) <= size


@given(networks(), st.floats(0, 0.999))
def test_global_keeps_the_best_of_all_layers(layers, sparsity):
    counts = ALLOCATIONS["global"].make(layers, sparsity)
    everything = torch.cat([u.scores.flatten() for u in layers.values()])
    owner = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor([u.total for u in layers.values()]))
    kept = len(everything) - removed_count(len(everything), sparsity)
    best = owner[everything.sort(descending=True, stable=True).indices[:kept]]
    assert [int(c.sum()) for c in counts.values()] == torch.bincount(best, minlength=len(layers)).tolist()


def test_global_over_units_of_unlike_size_stays_within_the_target():
    wide = layer("wide", torch.tensor([[1.0, 5.0, 6.0]]), elements=10)
    narrow = layer("narrow", torch.tensor([[2.0, 3.0, 9.0]]), elements=2)
    counts = ALLOCATIONS["global"].make({"wide": wide, "narrow": narrow}, 0.4)  # of 36 weights at most 14 go: 10 + 2 + 2
    assert [int(c) for c in counts.values()] == [2, 1]


def test_lamp_is_global_over_lamp_scores_and_never_empties_a_layer_first():
    small = layer("small", torch.tensor([[1e-3, 2e-3, 3e-3]]))
    large = layer("large", torch.tensor([[1.0, 2.0, 3.0]]))
    assert [int(c) for c in ALLOCATIONS["lamp"].make({"s": small, "l": large}, 2 / 3).values()] == [1, 1]
    assert [int(c) for c in ALLOCATIONS["global"].make({"s": small, "l": large}, 0.5).values()] == [0, 3]
    assert lamp_scores(torch.tensor([1.0, 4.0, 9.0])).tolist() == pytest.approx([1 / 14, 4 / 13, 1.0])


def test_erk_by_hand():
    """Raw densities (10+10)/100 and (100+100)/10000; at 90% of 10,100 weights 1,010 stay: both layers hold 1/2 of the mass."""
    a = layer("a", torch.rand(1, 100), shape=(10, 10))
    b = layer("b", torch.rand(1, 10_000), shape=(100, 100))
    scale = 1010 / (0.2 * 100 + 0.02 * 10_000)
    counts = ALLOCATIONS["erk"].make({"a": a, "b": b}, 0.9)
    assert int(counts["a"]) == pytest.approx(0.2 * scale * 100, abs=1)
    assert int(counts["a"]) + int(counts["b"]) == 1010


def test_erk_keeps_a_layer_dense_rather_than_denser_than_dense():
    a = layer("a", torch.rand(1, 4), shape=(2, 2))
    b = layer("b", torch.rand(1, 10_000), shape=(100, 100))
    counts = ALLOCATIONS["erk"].make({"a": a, "b": b}, 0.5)
    assert int(counts["a"]) == 4
    assert int(counts["b"]) == 10_004 - 5002 - 4
