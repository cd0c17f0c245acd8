"""What every criterion promises, as plain functions that raise AssertionError: test_criteria.py runs them over the registry,
test_the_tests.py over wrong criteria that they must catch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.data.batches import Batches
from secateur.layers import find_layers
from secateur.registry import Entry
from secateur.stats import Calibration, collect
from secateur.types import LayerStats, Need

Collect = Callable[..., Calibration]
REDUCTIONS = {"sum", "mean", "l2", "max", "abs_sum"}


def random_stats(shape: tuple[int, ...], seed: int = 0, **changes) -> LayerStats:
    """Every statistic of one layer, invented."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*(size or shape), generator=generator)

    full = {n.value: normal() for n in (Need.WEIGHT, Need.GRAD, Need.GRAD_ONE, Need.HESSIAN_GRAD, Need.MOVEMENT)}
    full |= {n.value: normal().square() for n in (Need.GRAD_SQ, Need.SYNFLOW_GRAD)}
    full |= {"grad_samples": normal(5, *shape), "row_samples": torch.ones(5)}
    full["input_norm"] = normal(1, *shape[1:]).abs()
    return LayerStats(name="layer.weight", samples=8, seed=3, **{**full, **changes})


def tensors_of(stats: LayerStats) -> dict[str, Tensor]:
    values = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    return {k: v for k, v in values.items() if isinstance(v, Tensor)}


def importance(entry: Entry, stats: LayerStats) -> Tensor:
    """The score of single weights: what an element pattern makes of the criterion's values."""
    score = entry.make(stats)
    return score.abs() if entry.facts["reduction"] == "l2" else score


def check_declaration(entry: Entry) -> None:
    assert isinstance(entry.facts["needs"], frozenset)
    assert Need.WEIGHT in entry.facts["needs"]
    assert all(isinstance(n, Need) for n in entry.facts["needs"])
    assert entry.facts["reduction"] in REDUCTIONS, f"{entry.name}: unknown reduction {entry.facts['reduction']!r}"
    assert entry.source, f"{entry.name}: no source"
    assert entry.summary.endswith("."), f"{entry.name}: no summary"


def check_needs_are_enough(entry: Entry, shape: tuple[int, ...] = (6, 4)) -> None:
    """It reads nothing that it did not declare, and what it declared cannot be missing."""
    full = random_stats(shape)
    undeclared = {n.value: None for n in Need if n not in entry.facts["needs"]}
    entry.make(dataclasses.replace(full, **undeclared))
    for need in entry.facts["needs"] - {Need.WEIGHT}:
        complaint = _complaint(entry, dataclasses.replace(full, **{need.value: None}))
        assert need.value in complaint, f"{entry.name} declares {need} and does not read it"


def _complaint(entry: Entry, stats: LayerStats) -> str:
    try:
        entry.make(stats)
    except LookupError as error:
        return str(error)
    return ""


def check_form(entry: Entry, stats: LayerStats) -> None:
    """Shape, dtype, finiteness."""
    score = entry.make(stats)
    assert isinstance(score, Tensor), f"{entry.name} returned {type(score).__name__}"
    assert score.shape == stats.weight.shape, f"{entry.name}: {tuple(score.shape)} for a weight {tuple(stats.weight.shape)}"
    assert score.dtype == torch.float32, f"{entry.name}: {score.dtype}"
    assert torch.isfinite(score).all(), f"{entry.name}: not finite"
    assert not score.requires_grad


def check_deterministic(entry: Entry, stats: LayerStats) -> None:
    """The same stats give the same bits, whatever the global random state, which is left alone."""
    torch.manual_seed(1)
    first = entry.make(stats).clone()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = entry.make(stats)
    assert torch.equal(first, second), f"{entry.name}: two calls differ"
    assert torch.equal(state, torch.get_rng_state()), f"{entry.name}: draws from the global generator"


def check_reads_only(entry: Entry, stats: LayerStats) -> None:
    before = {k: v.clone() for k, v in tensors_of(stats).items()}
    score = entry.make(stats)
    score.add_(1)  # neither the call nor the use of its result may reach into the statistics
    for name, value in tensors_of(stats).items():
        assert torch.equal(before[name], value), f"{entry.name}: changed {name}"


def check_equivariant(entry: Entry, stats: LayerStats) -> None:
    """Outputs in another order: the same scores in that order."""
    outputs = stats.weight.shape[0]
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(5))
    permuted = {k: v[order] if v.shape[0] == outputs else v for k, v in tensors_of(stats).items()}
    found = entry.make(dataclasses.replace(stats, **permuted))
    torch.testing.assert_close(found, entry.make(stats)[order], rtol=1e-5, atol=0)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that calibration might disturb."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": {k: id(v) for k, v in model.named_parameters()},
        "buffers": {k: id(v) for k, v in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "hooks": [[len(getattr(m, h)) for h in hooks] for m in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_same(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    for key in before:
        same = [
            x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) else x == y
            for x, y in zip(_leaves(before[key]), _leaves(after[key]), strict=True)
        ]
        assert all(same), f"the model's {key} changed"


def _leaves(value: object) -> list:
    return torch.utils._pytree.tree_leaves(value)


def score_all(
    entry: Entry,
    model: nn.Module,
    batches: list,
    *,
    collect: Collect = collect,
    loss=None,
) -> dict[str, Tensor]:
    layers, _ = find_layers(model)
    stats = collect(model, layers, entry.facts["needs"], batches=Batches(batches), loss=loss).layers
    return {name: importance(entry, s) for name, s in stats.items()}


def check_leaves_model(entry: Entry, model: nn.Module, batches: list) -> None:
    """Form on a real model's statistics, twice the same, the model as it was."""
    before = snapshot(model)
    first = score_all(entry, model, batches)
    assert_same(before, snapshot(model))
    second = score_all(entry, model, batches)
    for name, layer in find_layers(model)[0].items():
        assert first[name].shape == layer.shape
        assert first[name].dtype == torch.float32
        assert torch.isfinite(first[name]).all()
        assert torch.equal(first[name], second[name]), f"{entry.name}: {name} differs from one run to the next"


def check_uses_every_sample(entry: Entry, *, collect: Collect = collect) -> None:
    """No sample is left out and none counts twice: order and batching change nothing, each sample changes something."""
    model, x, y = regression(steps=10)  # further on, gradients are differences of large numbers and their rounding counts
    keywords = {"collect": collect, "loss": squared_error}
    whole = score_all(entry, model, [(x, y)], **keywords)
    order = torch.arange(len(x) - 1, -1, -1)
    _assert_scores_close(entry, whole, score_all(entry, model, [(x[order], y[order])], **keywords))
    parts = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    _assert_scores_close(entry, whole, score_all(entry, model, parts, **keywords))
    for i in (0, len(x) // 2, len(x) - 1):
        other_x, other_y = x.clone(), y.clone()
        other_x[i], other_y[i] = 3 * x[i] + 1, y[i] - 2
        changed = score_all(entry, model, [(other_x, other_y)], **keywords)
        assert any(not torch.allclose(whole[n], changed[n], rtol=1e-4) for n in whole), f"{entry.name}: sample {i} has no part"


def _assert_scores_close(entry: Entry, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        difference = float((a[name] - b[name]).norm() / a[name].norm())
        assert difference < 1e-5, f"{entry.name}: {name} depends on the order or the batches ({difference:.1e})"


def check_direction(entry: Entry) -> None:
    """Higher = keep: removing the half that scores lowest must do less harm than removing the half that scores highest.

    Harm is the loss of a trained network; for criteria of gradient flow it is the squared gradient norm lost at
    the start of training.
    """
    flow = Need.HESSIAN_GRAD in entry.facts["needs"]
    model, x, y = regression(steps=0 if flow else 300)

    def quality(pruned: nn.Module) -> float:
        value = squared_error(pruned, (x, y))
        if not flow:
            return -value.item()
        weights = [m.weight for m in pruned if isinstance(m, nn.Linear)]
        return float(sum(g.square().sum() for g in torch.autograd.grad(value, weights)))

    scores = score_all(entry, model, [(x, y)], loss=squared_error)
    without_low, without_high = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, score in scores.items():
            order = score.flatten().argsort()
            half = len(order) // 2
            without_low.get_parameter(name).view(-1)[order[:half]] = 0
            without_high.get_parameter(name).view(-1)[order[-half:]] = 0
    low, high = quality(without_low), quality(without_high)
    assert low > high, f"{entry.name}: without the low half {low:.4g}, without the high half {high:.4g}"


def squared_error(model: nn.Module, batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def regression(steps: int = 300) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small network, trained on a function of a few of its inputs."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(64, 8, generator=generator)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] - 0.5 * x[:, 3:4] + 0.3 * torch.randn(64, 1, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        squared_error(model, (x, y)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x, y
