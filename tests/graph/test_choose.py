"""Choosing units, against brute force under ties."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import RecipeError, UnknownName
from secateur.graph import choose_groups, kept_counts, select, trace
from secateur.select import removed_count


def layers(widths: list[int]) -> nn.Sequential:
    sizes = [3, *widths, 2]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def grouped(widths: list[int]):
    model = layers(widths)
    graph = trace(model, torch.randn(1, 3))
    return graph, choose_groups(graph, ("neuron",))


@st.composite
def problems(draw):
    widths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=4))
    levels = draw(st.sampled_from([1, 2, 50]))
    scores = [[draw(st.integers(0, levels)) / 3 for _ in range(w)] for w in widths]
    return widths, scores, draw(st.integers(0, 999)) / 1000, draw(st.integers(1, 3))


@settings(max_examples=60)
@given(problems())
def test_each_group_loses_its_lowest_and_of_equal_ones_the_higher_index(problem):
    widths, scores, sparsity, least = problem
    graph, groups = grouped(widths)
    given_ = {g.id: torch.tensor(s).double() for g, s in zip(groups, scores, strict=True)}
    removed = select(graph, groups, given_, sparsity, min_width=least)
    for group, own in zip(groups, scores, strict=True):
        order = sorted(range(len(own)), key=lambda i: (own[i], -i))
        count = min(removed_count(len(own), sparsity), max(len(own) - least, 0))
        assert removed.get(group.id, []) == sorted(order[:count])


@settings(max_examples=60)
@given(problems())
def test_globally_the_lowest_of_all_go_but_for_the_best_of_each_group(problem):
    widths, scores, sparsity, least = problem
    graph, groups = grouped(widths)
    given_ = {g.id: torch.tensor(s).double() for g, s in zip(groups, scores, strict=True)}
    removed = select(graph, groups, given_, sparsity, min_width=least, scope="global")
    open_ = []
    for g, own in enumerate(scores):
        best_first = sorted(range(len(own)), key=lambda i: (-own[i], i))
        open_ += [(own[i], -g, -rank, i) for rank, i in enumerate(best_first) if rank >= least]
    gone = sorted(open_)[: removed_count(sum(widths), sparsity)]
    for g, group in enumerate(groups):
        assert removed.get(group.id, []) == sorted(i for _, minus_g, _, i in gone if minus_g == -g)


@settings(max_examples=60)
@given(problems(), st.integers(2, 5), st.sampled_from(["local", "global"]))
def test_widths_are_multiples_and_the_total_is_the_nearest_that_whole_steps_allow(problem, multiple, scope):
    widths, scores, sparsity, least = problem
    graph, groups = grouped(widths)
    given_ = {g.id: torch.tensor(s).double() for g, s in zip(groups, scores, strict=True)}
    kept = kept_counts(graph, groups, given_, sparsity, round_to=multiple, min_width=least, scope=scope)
    for group in groups:
        assert kept[group.id] == group.units or (kept[group.id] % multiple == 0 and kept[group.id] >= least)
    if scope == "local":
        for group in groups:
            wanted = group.units - removed_count(group.units, sparsity)
            allowed = [n for n in range(1, group.units) if n % multiple == 0 and n >= least] + [group.units]
            assert abs(kept[group.id] - wanted) == min(abs(n - wanted) for n in allowed)
    else:
        gone = sum(g.units - kept[g.id] for g in groups)
        full = all(kept[g.id] == min([n for n in range(least, g.units) if n % multiple == 0], default=g.units) for g in groups)
        assert abs(gone - removed_count(sum(widths), sparsity)) <= multiple / 2 or full


class Blocks(nn.Module):
    """Two stages of equal blocks; only the second block of the first stage has small weights."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)) for _ in range(2)])
        self.b = nn.ModuleList([nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)) for _ in range(2)])

    def forward(self, x):
        for block in (*self.a, *self.b):
            x = x + block(x)
        return x


def test_isomorphic_groups_compete_with_their_like_only():
    model = Blocks()
    graph = trace(model, torch.randn(1, 6))
    groups = choose_groups(graph, ("neuron",))
    low = {"a.1.0.weight": 0.0, "b.0.0.weight": 1.0}
    scores = {g.id: torch.full((g.units,), 2.0) * low.get(g.name, 1.0) + torch.rand(g.units) for g in groups}
    kept = {graph.groups[i].name: n for i, n in kept_counts(graph, groups, scores, 0.25, scope="isomorphic").items()}
    assert kept["a.0.0.weight"] == 8
    assert kept["a.1.0.weight"] == 4, "a quarter of the 16 units of both blocks"
    assert kept["b.0.0.weight"] + kept["b.1.0.weight"] == 6
    local = kept_counts(graph, groups, scores, 0.25)
    assert [local[g.id] for g in groups] == [6, 6, 3, 3]


def test_tied_groups_keep_the_same_fraction_and_compete_as_one():
    graph, groups = grouped([8, 4, 6])
    first, second, third = groups
    first.ties, second.ties = {second.id}, {first.id}
    scores = {
        first.id: torch.tensor([9.0, 9, 9, 9, 1, 1, 1, 1]),
        second.id: torch.tensor([9.0, 1, 9, 1]),
        third.id: torch.full((6,), 5.0),
    }
    kept = kept_counts(graph, groups, scores, 0.2, scope="global")  # 2 of 4 + 6
    assert [kept[g.id] for g in groups] == [4, 2, 6]


@pytest.mark.parametrize(("arguments", "words"), [({"round_to": 0}, "round_to"), ({"min_width": True}, "min_width")])
def test_wrong_numbers_are_refused(arguments, words):
    graph, groups = grouped([4])
    with pytest.raises(RecipeError, match=words):
        select(graph, groups, {groups[0].id: torch.ones(4)}, 0.5, **arguments)


def test_what_is_no_scope_or_sparsity_is_refused():
    graph, groups = grouped([4])
    with pytest.raises(UnknownName, match="isomorphic"):
        select(graph, groups, {groups[0].id: torch.ones(4)}, 0.5, scope="isomorfic")
    with pytest.raises(RecipeError, match="float"):
        select(graph, groups, {groups[0].id: torch.ones(4)}, 1)
