"""Is a large network pruned better than a small one that was never larger? At equal nonzeros, trained alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.data.batches import Batch, Batches, Loss, default_loss
from secateur.errors import ModelError, RecipeError, TrainingError
from secateur.layers import find_layers
from secateur.measure.quality import Evaluate, qualities
from secateur.progress import advance
from secateur.recipe import Recipe
from secateur.sparsity import check_sparsity
from secateur.train.gradual import gradual
from secateur.train.loop import Rate, mixed, seed_everything, undisturbed

_BEGIN, _END, _CHOICES = 0.15, 0.7, 40  # of the training: where pruning begins and ends, and how many masks are chosen
_WARMUP = 0.05


@dataclass(frozen=True)
class Trained:
    """One network after its training."""

    size: int  #: what `make` was called with
    sparsity: float  #: asked for, of the weights that can be pruned; 0 of dense networks
    seed: int
    parameters: int
    nonzeros: int  #: of all parameters, biases and embeddings too
    quality: Mapping[str, float]


def versus(
    make: Callable[[int], nn.Module],
    size: int,
    batches: Iterable[Batch],
    evaluate: Evaluate,
    *,
    sparsities: Sequence[float] = (0.8, 0.9),
    epochs: int = 1,
    lr: float = 2e-3,
    clip: float | None = 1.0,
    step: int = 1,
    seeds: int = 1,
    loss: Loss | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
) -> list[Trained]:
    """Train the network of `size` dense and pruned to each sparsity, and beside each a small dense one of as many nonzeros.

    All are trained for the same epochs, on the same batches in the same order, by AdamW with the same learning rates (a
    warm-up, then half a cosine). Pruning is gradual, along a cubic, from 15% to 70% of the training; the small network
    is the smallest that has at least as many parameters as the pruned one has nonzeros (Zhu and Gupta 2017, To prune, or
    not to prune, whose question this is).

    Args:
        make: builds an untrained network of a size: a width, a number of channels. Parameters must grow with it.
        size: of the large network.
        batches: to train on.
        evaluate: quality of a network.
        sparsities: of the large network, over the weights that can be pruned.
        epochs, lr, clip: of every training; `clip` is the largest norm of all gradients together.
        step: sizes of small networks are multiples of it.
        seeds: trainings of each, from seed 0: of the first weights, and of the order.
        loss: of the training; the model's own by default.
        recipe: keys of `gradual`, such as ``{"allocation": "erk", "regrow": "splice"}``.

    Returns:
        The networks: for each seed the large dense one, then for each sparsity the pruned one and the small dense one.

    Raises RecipeError for a bad sparsity, ModelError where no smaller network has as many parameters, TrainingError for a
    loss that is NaN or infinite.

    Example::

        rows = versus(lambda width: Perceptron(width), 256, batches, accuracy(test), sparsities=[0.9], epochs=5)
    """
    if not sparsities or min(map(check_sparsity, sparsities)) == 0.0:
        raise RecipeError(f"give the sparsities of the large network, each above 0; got {list(sparsities)}")
    if min(epochs, seeds, step, size) < 1:
        raise RecipeError(f"epochs, seeds, step and size count from 1; got {epochs}, {seeds}, {step} and {size}")
    with torch.random.fork_rng():
        smaller = {s: _small(make, size, s, step) for s in sparsities}
    plan = [(size, 0.0)] + [pair for s in sparsities for pair in ((size, s), (smaller[s], 0.0))]
    training = _Training(Batches(batches), epochs, lr, clip, loss or default_loss, dict(recipe or {}))
    done: list[Trained] = []
    for seed in range(seeds):
        for at, sparsity in plan:
            advance("networks", len(done), seeds * len(plan), f"size {at}, sparsity {sparsity:g}")
            with torch.random.fork_rng():
                seed_everything(mixed(seed, "first weights"))
                model = make(at)
            training.run(model, sparsity, seed)
            total, left = _counts(model)
            done.append(Trained(at, sparsity, seed, total, left, qualities(evaluate, model)))
    advance("networks", len(done), len(done))
    return done


def _small(make: Callable[[int], nn.Module], size: int, sparsity: float, step: int) -> int:
    """The smallest size with at least as many parameters as the large network has nonzeros."""
    large = make(size)
    total, _ = _counts(large)
    prunable = sum(layer.parameter.numel() for layer in find_layers(large)[0].values())
    wanted = total - int(sparsity * prunable + 0.5)
    low, high = 1, -(-size // step)  # in steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _counts(make(middle * step))[0] >= wanted else (middle + 1, high)
    found, count = low * step, _counts(make(low * step))[0]
    if found >= size or count < wanted:
        raise ModelError(
            f"no network smaller than size {size} has the {wanted} nonzeros that sparsity {sparsity:g} leaves of it: size "
            f"{found} has {count} parameters. Let what varies be a width that most parameters depend on."
        )
    return found


def _counts(model: nn.Module) -> tuple[int, int]:
    """Parameters, and how many are not zero."""
    tensors = [p.detach() for p in model.parameters()]
    return sum(t.numel() for t in tensors), sum(int(t.count_nonzero()) for t in tensors)


@dataclass(frozen=True)
class _Training:
    """How every network is trained."""

    data: Batches
    epochs: int
    lr: float
    clip: float | None
    loss: Loss
    recipe: Mapping[str, Any]

    def run(self, model: nn.Module, sparsity: float, seed: int) -> None:
        """Train `model` in place, pruning it on the way where there is a sparsity."""
        length = sum(1 for _ in self.data)
        rate = Rate(self.lr, _WARMUP, self.epochs * length)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=self.lr, weight_decay=0.0)
        with undisturbed(model), self._pruner(model, optimizer, sparsity, rate.steps) as pruner:
            seed_everything(mixed(seed, "training"))
            for epoch in range(self.epochs):
                for number, batch in enumerate(self.data.shuffled(mixed(seed, "order", epoch)), epoch * length):
                    for group in optimizer.param_groups:
                        group["lr"] = rate(number)
                    value = self._step(model, optimizer, batch, number)
                    if pruner is not None:
                        pruner.step()
                    advance("training", number, rate.steps, f"loss {value:.4g}")
        advance("training", rate.steps, rate.steps)

    def _pruner(self, model: nn.Module, optimizer: Optimizer, sparsity: float, steps: int) -> Any:
        if not sparsity:
            return nullcontext()
        begin, end = (round(share * steps) for share in (_BEGIN, _END))
        every = max(1, (end - begin) // _CHOICES)
        return gradual(model, optimizer, self.recipe, sparsity=sparsity, begin=begin, end=end, every=every)

    def _step(self, model: nn.Module, optimizer: Optimizer, batch: Batch, number: int) -> float:
        optimizer.zero_grad()
        loss = self.loss(model, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss became {value} at step {number + 1}: lower the learning rate")
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        return value
