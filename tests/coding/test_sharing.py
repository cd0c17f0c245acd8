"""k-means and whole numbers: least distances, zeros that stay zero, errors that are made up for, bits within a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from secateur.coding.budget import choose
from secateur.coding.integers import largest, quantised
from secateur.coding.kmeans import INITS, kmeans, nearest
from secateur.coding.share import rounded_vector, shared
from secateur.coding.streams import entropy_bits
from secateur.errors import RecipeError


def distance(values, centroids):
    return ((values[:, None] - np.asarray(centroids)) ** 2).min(1).sum()


def least_distance(values, clusters):
    """By trying every partition of the sorted values into intervals."""
    ordered = np.sort(values)
    costs = []
    for cuts in itertools.combinations(range(1, len(ordered)), clusters - 1):
        parts = np.split(ordered, cuts)
        costs.append(sum(((p - p.mean()) ** 2).sum() for p in parts))
    return min(costs)


def test_some_initialisation_is_near_the_optimum():
    for seed in range(10):
        values = np.random.default_rng(seed).standard_normal(14)
        best = least_distance(values, 3)
        found = [distance(values, kmeans(values, 3, init, seed)) for init in INITS]
        assert best - 1e-12 <= min(found) <= 1.1 * best


@pytest.mark.parametrize("init", INITS)
def test_centroids_are_means_of_their_clusters(init):
    values = np.random.default_rng(0).standard_normal(5000)
    centroids = kmeans(values, 16, init)
    assert len(centroids) == 16
    assert np.array_equal(nearest(values, centroids), np.abs(values[:, None] - centroids).argmin(1))
    for i in range(16):
        assert centroids[i] == pytest.approx(values[nearest(values, centroids) == i].mean(), abs=1e-3)


def test_initialisations_are_the_papers():
    values = np.concatenate([np.zeros(97), [1.0, 2.0, 3.0]]) + np.arange(100) * 1e-6
    linear = kmeans(values, 4, "linear")
    assert linear.round().tolist() == [0, 1, 2, 3]  # large weights get centroids of their own
    assert kmeans(np.array([1.0, 1.0, 2.0]), 5).tolist() == [1.0, 2.0]
    assert kmeans(np.empty(0), 5).tolist() == []


def test_refusals():
    with pytest.raises(RecipeError, match="Did you mean 'linear'"):
        kmeans(np.ones(3), 2, "liner")
    with pytest.raises(RecipeError, match="at least one cluster"):
        kmeans(np.ones(3), 0)
    with pytest.raises(RecipeError, match=r"1\.5 to 12 bits"):
        quantised(torch.ones(2, 2), 20)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_shared_weights_have_few_values_and_their_zeros(bits):
    torch.manual_seed(0)
    weight = torch.randn(50, 60) * (torch.rand(50, 60) < 0.3)
    found = shared(weight, bits)
    assert torch.equal(found == 0, weight == 0)
    assert 2**bits - 1 <= len(found.unique()) <= 2**bits
    assert torch.equal(found, found.bfloat16().float())
    full = shared(torch.randn(50, 60), bits)
    assert 2**bits - 1 <= len(full.unique()) <= 2**bits
    assert not bool((full == 0).any())


def test_a_tiny_weight_does_not_vanish():
    weight = torch.tensor([[1e-45, 1.0, 0.0]])
    assert torch.equal(shared(weight, 2) == 0, weight == 0)


def test_vectors_are_rounded_only_where_that_is_harmless():
    assert torch.equal(rounded_vector(torch.tensor([1 / 3])), torch.tensor([1 / 3]).half().float())
    for harmful in (torch.tensor([1e-7, 1.0]), torch.tensor([1e6]), torch.tensor([1, 2])):
        assert torch.equal(rounded_vector(harmful), harmful)


@pytest.mark.parametrize("bits", [2, 4, 4.5, 8])
def test_whole_numbers_are_the_nearest_and_zeros_stay(bits):
    torch.manual_seed(0)
    weight = torch.randn(20, 3, 5, 5) * (torch.rand(20, 3, 5, 5) < 0.5)
    coded = quantised(weight, bits)
    assert coded.codes.abs().max() <= largest(bits)
    assert torch.equal(coded.codes[weight == 0], torch.zeros_like(coded.codes[weight == 0]))
    scale = coded.scales.reshape(-1, 1, 1, 1)
    inside = weight.abs() <= scale * largest(bits)
    assert bool(((coded.values() - weight).abs() <= scale / 2 * 1.001)[inside].all())
    assert torch.equal(coded.scales, coded.scales.half().float())


@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_steps_for_an_entropy_take_that_entropy_and_err_less_than_clipping(bits):
    torch.manual_seed(0)
    weight = torch.randn(64, 2000) * torch.rand(64, 1)
    free = quantised(weight, bits, clipped=False)
    assert entropy_bits(free.codes.unique(return_counts=True)[1].numpy()) / weight.numel() == pytest.approx(bits, abs=0.06)
    clipped = [quantised(weight, b) for b in np.arange(bits - 0.5, bits + 1.5, 0.125)]
    same = min(clipped, key=lambda c: abs(entropy_bits(c.codes.unique(return_counts=True)[1].numpy()) / weight.numel() - bits))
    assert (free.values() - weight).square().sum() < 0.97 * (same.values() - weight).square().sum()


def correlated(count=400, width=40):
    torch.manual_seed(1)
    return torch.randn(count, 6) @ torch.randn(6, width) + 0.3 * torch.randn(count, width)


def test_errors_are_made_up_for_and_removed_weights_stay_removed():
    inputs, weight = correlated(), torch.randn(30, 40)
    weight = weight * (torch.rand(30, 40) < 0.5)
    gram = (inputs.T @ inputs)[None]
    for bits in (3, 4):
        plain, repaired = (quantised(weight, bits, gram=g).values() for g in (None, gram))
        assert torch.equal(repaired[weight == 0], torch.zeros_like(repaired[weight == 0]))
        lost = [float(((w - weight) @ inputs.T).norm()) for w in (plain, repaired)]
        assert lost[1] < 0.6 * lost[0]


def test_the_sweep_is_the_one_of_the_paper():
    """Column by column with explicit inverses: round, and move the rest by the optimal brain surgeon's update."""
    inputs, weight = correlated(200, 8).double(), torch.randn(3, 8)
    gram = (inputs.T @ inputs).float()[None]
    coded = quantised(weight, 4, gram=gram)
    order = gram[0].diagonal().argsort(descending=True)
    matrix = gram[0].double() + 0.01 * gram[0].diagonal().double().mean() * torch.eye(8)
    current, scales = weight.double().clone(), coded.scales.double()
    for at, j in enumerate(order.tolist()):
        rest = order[at:]
        inverse = torch.linalg.inv(matrix[rest][:, rest])
        rounded = (current[:, j] / scales).round().clamp(-7, 7)
        assert torch.equal(rounded.to(torch.int16), coded.codes[:, j])
        current[:, rest] -= ((current[:, j] - rounded * scales) / inverse[0, 0])[:, None] * inverse[0]


def test_groups_of_a_depthwise_convolution_are_their_own():
    torch.manual_seed(0)
    weight, gram = torch.randn(6, 1, 3, 3), torch.eye(9)[None] * torch.arange(1, 7).reshape(6, 1, 1)
    assert torch.equal(quantised(weight, 6, gram=gram.float()).codes, quantised(weight, 6).codes)


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_is_spent_best(seed):
    rng = np.random.default_rng(seed)
    options = {str(i): [(int(rng.integers(1, 60)), float(rng.random())) for _ in range(4)] for i in range(5)}
    for budget in (60, 120, 180):
        chosen = [
            sum(layer[i][1] for layer, i in zip(options.values(), which, strict=True))
            for which in itertools.product(range(4), repeat=5)
            if sum(layer[i][0] for layer, i in zip(options.values(), which, strict=True)) <= budget
        ]
        if not chosen:
            with pytest.raises(RecipeError, match="too few"):
                choose(options, budget)
            continue
        found = choose(options, budget)
        assert sum(options[n][i][1] for n, i in found.items()) == pytest.approx(min(chosen))
        assert sum(options[n][i][0] for n, i in found.items()) <= budget


def test_large_budgets_are_kept_too():
    rng = np.random.default_rng(0)
    options = {str(i): [(int(c), 1.0 / c) for c in rng.integers(10_000, 900_000, 9)] for i in range(40)}
    budget = 12_000_003
    found = choose(options, budget)
    spent = sum(options[n][i][0] for n, i in found.items())
    assert 0.98 * budget < spent <= budget
