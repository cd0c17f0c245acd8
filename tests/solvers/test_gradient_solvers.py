"""CHITA and WoodFisher against explicit inverses and against every mask of tiny problems."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.criteria import CRITERIA
from secateur.data.batches import Batches
from secateur.errors import RecipeError
from secateur.fisher import fisher_blocks
from secateur.layers import find_layers
from secateur.patterns import make_pattern
from secateur.select import spread
from secateur.solvers import SOLVERS
from secateur.stats import collect
from secateur.types import LayerStats, Need


def problem(rows: int, columns: int, samples: int = 40, seed: int = 0) -> LayerStats:
    """A layer with correlated gradients of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    width = rows * columns
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    gradients = torch.randn(samples, width, generator=generator) @ mix * torch.randn(width, generator=generator).exp()
    weight = torch.randn(rows, columns, generator=generator)
    samples_of = torch.randint(1, 9, (samples,), generator=generator)
    return LayerStats("layer.weight", weight, grad_samples=gradients.reshape(-1, rows, columns), row_samples=samples_of)


def run(solver, stats, keep, pattern="element", scores=None, **options):
    made = make_pattern(pattern)
    if scores is None:
        scores = made.fold(stats.weight.abs()).sum(2)
    counts = spread(keep, len(scores)) if isinstance(keep, int) else keep
    return SOLVERS[solver].make(stats.weight, scores, counts, made, stats, **options)


def masks(count, width):
    for chosen in itertools.combinations(range(width), count):
        mask = torch.zeros(width, dtype=torch.bool)
        mask[list(chosen)] = True
        yield mask


class Quadratic:
    """The problem of the CHITA paper with its matrix written out, in float64."""

    def __init__(self, stats: LayerStats, damp: float, first_order: float):
        a = stats.grad_samples.flatten(1).double()
        self.start = stats.weight.flatten().double()
        fisher = a.t() @ a / len(a)
        self.matrix = fisher + damp * fisher.diagonal().mean() * torch.eye(len(fisher))
        sizes = stats.row_samples.double()
        self.gradient = first_order * (a * sizes.sqrt()[:, None]).sum(0) / sizes.sum()

    def __call__(self, weight: torch.Tensor) -> float:
        change = weight.flatten().double() - self.start
        return float(change @ self.matrix @ change / 2 + self.gradient @ change)

    def best_on(self, mask: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(self.start)
        side = self.matrix @ self.start - self.gradient
        result[mask] = torch.linalg.solve(self.matrix[mask][:, mask], side[mask])
        return result


@pytest.mark.parametrize("first_order", [0.0, 1.0])
@pytest.mark.parametrize("samples", [5, 40])
def test_chita_is_exact_on_its_support_and_near_the_best_of_all(first_order, samples):
    for seed in range(4):
        stats = problem(2, 6, samples, seed)
        loss = Quadratic(stats, 0.1, first_order)
        solution = run("chita", stats, 6, first_order=first_order)
        found = solution.weight.flatten().double()
        torch.testing.assert_close(found, loss.best_on(solution.mask.flatten()), rtol=1e-3, atol=1e-4)
        everything = {loss(loss.best_on(mask)) for mask in masks(6, 12)}
        magnitude = loss(loss.best_on(run("keep", stats, 6).mask.flatten()))
        assert loss(found) <= magnitude + 1e-6
        assert sum(value < loss(found) - 1e-6 for value in everything) <= 46, "among the best twentieth of 924 supports"


def test_chita_leaves_all_weights_where_all_are_kept_and_no_gradient_pulls():
    stats = problem(3, 8)
    torch.testing.assert_close(run("chita", stats, 24).weight, stats.weight)
    moved = run("chita", stats, 24, first_order=1.0).weight
    loss = Quadratic(stats, 0.1, 1.0)
    torch.testing.assert_close(moved.flatten().double(), loss.best_on(torch.ones(24, dtype=torch.bool)), rtol=1e-3, atol=1e-4)


def test_chita_says_where_gradients_tell_nothing():
    stats = problem(3, 8)
    stats.grad_samples.zero_()
    solution = run("chita", stats, 12)
    assert torch.equal(solution.weight, run("keep", stats, 12).weight)
    assert solution.notes == ("every gradient of 'layer.weight' is zero: its largest weights were kept as they are",)


@pytest.mark.parametrize("block", [4, 5, 24, 50])
def test_the_blocks_of_the_fisher_are_those_of_the_whole(block):
    rows = problem(3, 8).grad_samples.flatten(1)
    whole = rows.t() @ rows / len(rows)
    whole = whole + 0.1 * whole.diagonal().mean() * torch.eye(24)
    for i, found in enumerate(fisher_blocks(rows, block, 0.1)):
        part = slice(i * block, min((i + 1) * block, 24))
        size = len(whole[part])
        torch.testing.assert_close(found[:size, :size], whole[part, part])
        assert torch.equal(found[size:, size:], torch.eye(block - size))
        assert not found[size:, :size].any()


def test_woodfisher_scores_are_the_loss_of_removal_after_the_best_repair():
    stats = problem(2, 6)
    loss = Quadratic(stats, 0.1, 0.0)
    scores = CRITERIA["woodfisher"].make(stats, block=12).flatten()
    for q in range(12):
        mask = torch.ones(12, dtype=torch.bool)
        mask[q] = False
        assert float(scores[q]) == pytest.approx(loss(loss.best_on(mask)), rel=1e-3)


@pytest.mark.parametrize("pattern", ["element", "2:4", "2x1", "1x2"])
def test_woodfisher_updates_as_the_inverse_says(pattern):
    stats = problem(4, 8)
    made = make_pattern(pattern)
    folded = made.fold(stats.weight)
    keep = torch.full((folded.shape[0],), folded.shape[1] // 2)
    solution = run("woodfisher", stats, keep, pattern, block=32)
    loss = Quadratic(stats, 0.1, 0.0)
    torch.testing.assert_close(solution.weight.flatten().double(), loss.best_on(solution.mask.flatten()), rtol=1e-3, atol=1e-4)
    inverse = torch.linalg.inv(loss.matrix)
    order = made.fold(torch.arange(32).reshape(4, 8)).reshape(-1, folded.shape[2])
    cost = torch.stack([w @ torch.linalg.inv(inverse[q][:, q]) @ w / 2 for q in order for w in [loss.start[q]]])
    best = cost.reshape(folded.shape[:2]).topk(int(keep[0]), 1).indices
    wanted = made.unfold(torch.zeros(folded.shape[:2], dtype=torch.bool).scatter_(1, best, True), stats.weight.shape)
    assert torch.equal(solution.mask, wanted)


def test_small_blocks_do_not_see_each_other():
    stats = problem(2, 6)
    solution = run("woodfisher", stats, 6, block=3)
    fisher = fisher_blocks(stats.grad_samples.flatten(1), 3, 0.1).double()
    mask, start = solution.mask.reshape(4, 3), stats.weight.reshape(4, 3).double()
    for i in range(4):
        k = mask[i]
        wanted = start[i, k] + torch.linalg.solve(fisher[i][k][:, k], fisher[i][k][:, ~k] @ start[i, ~k])
        torch.testing.assert_close(solution.weight.reshape(4, 3)[i, k].double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["chita", "woodfisher"])
@pytest.mark.parametrize("pattern", ["element", "row", "2:4", "4x1", "neuron"])
def test_counts_are_exact_what_is_gone_stays_gone_and_the_bits_repeat(solver, pattern):
    made, stats = make_pattern(pattern), problem(8, 16)
    scores = made.fold(stats.weight.abs()).sum(2)
    scores[:, 0] = -torch.inf
    gone = made.unfold(torch.isneginf(scores), stats.weight.shape)
    stats.weight[gone] = 0
    keep = torch.full((len(scores),), max(1, scores.shape[1] // 2 - 1))
    solution = run(solver, stats, keep, pattern, scores)
    assert torch.equal(made.fold(solution.mask).all(2).sum(1), keep)
    assert torch.equal(made.fold(solution.mask).all(2), made.fold(solution.mask).any(2)), "whole units only"
    assert not (solution.mask & gone).any()
    assert not solution.weight[~solution.mask].any()
    assert torch.equal(run(solver, stats, keep, pattern, scores).weight, solution.weight)


@pytest.mark.parametrize(
    ("solver", "options"), [("chita", {"damp": 0.0}), ("woodfisher", {"block": 0}), ("chita", {"iterations": 0})]
)
def test_options_out_of_range_are_refused(solver, options):
    with pytest.raises(RecipeError, match=solver):
        run(solver, problem(2, 6), 6, **options)


def net() -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), [
        (x[:20], torch.arange(20) % 3),
        (x[20:], torch.arange(30) % 3),
    ]


def test_sample_gradients_are_those_of_single_samples_and_of_groups(monkeypatch):
    model, data = net()
    layers, _ = find_layers(model)
    needs = {Need.GRAD_SAMPLES, Need.GRAD, Need.GRAD_SQ}
    found = collect(model, layers, needs, batches=Batches(data)).layers["0.weight"]
    assert found.grad_samples.shape == (50, 8, 6)
    torch.testing.assert_close(found.grad_samples.mean(0), found.grad)
    torch.testing.assert_close(found.grad_samples.square().mean(0), found.grad_sq)
    monkeypatch.setattr("secateur.stats.samples.ROWS", 8)
    grouped = collect(model, layers, needs, batches=Batches(data)).layers["0.weight"]
    assert grouped.row_samples.tolist() == [7, 7, 6, 7, 7, 7, 7, 2]
    torch.testing.assert_close(grouped.grad_samples[1], found.grad_samples[7:14].mean(0) * 7**0.5)
    weights = grouped.row_samples.sqrt()[:, None, None] / 50
    torch.testing.assert_close((grouped.grad_samples * weights).sum(0), grouped.grad)


@pytest.mark.parametrize("solver", ["chita", "woodfisher"])
def test_prune_repairs_with_gradients_alike_in_one_part_and_layer_by_layer(solver, monkeypatch):
    model, data = net()
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data -= 0.5 * g

    def lost(pruned: nn.Module) -> float:
        return float(nn.functional.cross_entropy(pruned(data[0][0]).detach(), data[0][1]))

    kept = sc.prune(model, sparsity=0.4, data=data[:1])
    result = sc.prune(model, sparsity=0.4, solver=solver, data=data[:1])
    assert result.masks.kept() == kept.masks.kept()
    assert lost(result.model) < lost(kept.model)
    monkeypatch.setattr("secateur.stats.samples.BYTES", 4000)
    apart = sc.prune(model, sparsity=0.4, solver=solver, data=data[:1])
    assert apart.masks.kept() == kept.masks.kept()
