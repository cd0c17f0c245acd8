"""Gradual pruning inside the user's own training loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.errors import LayerError, RecipeError, TrainingError
from secateur.layers import find_layers
from secateur.schedules import make_schedule
from secateur.selection import Method, Named, choose, fitting, resolve, target_sparsity
from secateur.stats import collect
from secateur.train.hold import Held, hold, unwrapped
from secateur.types import LayerStats, MaskSet, Need, Pattern

log = logging.getLogger("secateur")
_FROM_BACKWARD = {Need.GRAD, Need.GRAD_ONE}  #: what a training step leaves in ``.grad``


def gradual(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    end: int,
    begin: int = 0,
    every: int = 1,
    sparsity: float | None = None,
    criterion: Named = "magnitude",
    pattern: Named | Pattern = "element",
    allocation: Named | None = None,
    reduction: str | None = None,
    schedule: Named = "cubic",
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> Gradual:
    """Prune `model` step by step while the user's own loop trains it (Zhu and Gupta 2017).

    A context manager. Call its ``step()`` after each ``optimizer.step()`` and before gradients are zeroed. At steps `begin`,
    ``begin + every``, ... and `end` new masks are chosen, so that `sparsity` is reached at `end` exactly; between them, and
    afterwards until the block ends, masks are held as by `hold`. What is removed stays removed.

    Args:
        model: what is trained; it may be compiled or wrapped by DistributedDataParallel.
        optimizer: the one that trains it.
        end: step at which the target is reached.
        begin: step at which pruning begins, at progress 0 of the schedule.
        every: steps between two choices; weights need some to recover, 100 in large trainings.
        sparsity: fraction of the weights to remove; patterns that fix it need none.
        criterion: scores made of weights, or of weights and the gradients that the last backward left in ``.grad``.
        pattern: what is removed together.
        allocation: how much each layer loses; as in `prune`.
        reduction: how a unit's score is made of its elements'; the criterion's own by default.
        schedule: how sparsity grows from `begin` to `end`.
        layers: only these, as in `prune`.
        ignore: not these.
        seed: of criteria that draw numbers.

    Raises:
        RecipeError: a schedule that ends before it begins, an unknown name, or a criterion that needs calibration data.
        LayerError: nothing to prune.

    Example::

        with sc.gradual(model, optimizer, sparsity=0.9, begin=100, end=1000, every=50) as pruner:
            for x, y in batches:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
                pruner.step()
    """
    _check_steps(begin, end, every)
    method = resolve(criterion=criterion, pattern=pattern, allocation=allocation, reduction=reduction)
    if beyond := sorted(need.value for need in method.needs - _FROM_BACKWARD if need.data or need is Need.SYNFLOW_GRAD):
        raise RecipeError(
            f"criterion {method.criterion_name!r} needs {', '.join(beyond)}, which a training step does not give. "
            "Choose one of weights or gradients for gradual pruning, or use sc.prune with several steps."
        )
    return Gradual(
        unwrapped(model),
        optimizer,
        method,
        target_sparsity(sparsity, method.pattern),
        schedule,
        (begin, end, every),
        layers,
        ignore,
        seed,
    )


class Gradual:
    """A gradual pruning in progress; made by `gradual`.

    To go on with a stopped one, make it with the same arguments, call `load_state_dict`, and enter it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        target: float,
        schedule: Named,
        steps: tuple[int, int, int],
        layers: Sequence[str] | None,
        ignore: Sequence[str],
        seed: int,
    ):
        self._model, self._optimizer, self._method, self._target, self._seed = model, optimizer, method, target, seed
        self._begin, self._end, self._every = steps
        self._schedule = make_schedule(schedule)
        if method.pattern.sparsity is not None and self._schedule(0.0, target) != target:
            raise RecipeError(
                f"pattern {method.pattern.name} has one sparsity and nothing in between, so it cannot grow along schedule "
                f"{schedule!r}. Use a schedule that prunes at once, at begin."
            )
        found, skipped = find_layers(model, layers=layers, ignore=ignore)
        self._layers, refused = fitting(found, method.pattern)
        if refused and layers is not None:
            name, why = next(iter(refused.items()))
            raise LayerError(f"the layer {name!r} was asked for, but cannot have pattern {method.pattern.name}: {why}")
        if not self._layers:
            reasons = "; ".join(f"{n}: {r}" for n, r in list({**skipped, **refused}.items())[:5])
            raise LayerError(
                f"there is nothing to prune. {reasons or 'The model has no linear, convolution or recurrent layer'}."
            )
        self._masks = MaskSet({n: torch.ones_like(layer.parameter, dtype=torch.bool) for n, layer in self._layers.items()})
        self._step = 0
        self._held: Held | None = None

    @property
    def masks(self) -> MaskSet:
        """The masks in force: of weights, and of biases where the pattern removes whole outputs. All kept at first."""
        return self._masks

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed so far, over the layers that are pruned."""
        return MaskSet({name: self._masks[name] for name in self._layers}).sparsity()

    def step(self) -> None:
        """Count one step of the optimizer, and choose new masks where one is due.

        Raises TrainingError outside the ``with`` block, or where gradients are needed and were zeroed already;
        NonFiniteError where weights or gradients are NaN or infinite.
        """
        if self._held is None:
            raise TrainingError("gradual pruning holds masks only inside its block: with sc.gradual(...) as pruner: ...")
        self._step += 1
        since = self._step - self._begin
        if self._step == self._end or (since >= 0 and self._step < self._end and since % self._every == 0):
            self._choose()

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors from which `load_state_dict` goes on; save it with the model's and the optimizer's."""
        return {"step": self._step, **self._plan(), "masks": dict(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises TrainingError where it is of another schedule or of other layers."""
        changed = [f"{key} was {state.get(key)}, is {now}" for key, now in self._plan().items() if state.get(key) != now]
        if changed:
            raise TrainingError(f"this state is of another gradual pruning: {'; '.join(changed)}. Use its settings to go on.")
        biases = {layer.bias for layer in self._layers.values()}
        if other := set(state["masks"]) - biases ^ set(self._layers):
            raise TrainingError(f"this state is of other layers: {', '.join(sorted(other))} are in one and not in the other")
        self._step = int(state["step"])
        self._masks = MaskSet(state["masks"])
        if self._held is not None:
            self._held.update(self._masks)

    def __enter__(self) -> Gradual:
        self._held = hold(self._optimizer, self._masks, self._model)
        if self._step == 0 == self._begin and self._schedule(0.0, self._target) > 0.0:
            self._choose()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None
        if kind is None and self._step < self._end:
            log.warning(
                "gradual pruning was left at step %d of %d with sparsity %.4f; its target %.4f was not reached",
                self._step,
                self._end,
                self.sparsity,
                self._target,
            )

    def _plan(self) -> dict[str, float]:
        return {"sparsity": self._target, "begin": self._begin, "end": self._end, "every": self._every}

    def _choose(self) -> None:
        """New masks for the sparsity that the schedule wants now."""
        sparsity = self._schedule((self._step - self._begin) / (self._end - self._begin), self._target)
        if sparsity == 0.0:
            return
        masks = choose(self._layers, self._stats(), sparsity=sparsity, method=self._method, previous=self._masks)
        assert self._held is not None
        self._held.update(masks)
        self._masks = masks

    def _stats(self) -> dict[str, LayerStats]:
        stats = collect(self._model, self._layers, {Need.WEIGHT}, seed=self._seed).layers
        if not self._method.needs & _FROM_BACKWARD:
            return stats
        for name, layer in self._layers.items():
            if layer.parameter.grad is None:
                when = "begin at 1 or later" if self._step == 0 else "call pruner.step() before optimizer.zero_grad()"
                raise TrainingError(
                    f"criterion {self._method.criterion_name!r} needs gradients, and {name!r} has none "
                    f"at step {self._step}: {when}"
                )
            grad = layer.canonical(layer.parameter.grad).float()
            stats[name] = replace(stats[name], grad=grad, grad_one=grad)
        return stats


def _check_steps(begin: int, end: int, every: int) -> None:
    for name, value in (("begin", begin), ("end", end), ("every", every)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise RecipeError(f"gradual pruning: {name} counts optimizer steps, a whole number; got {value!r}")
    if begin < 0:
        raise RecipeError(f"gradual pruning: begin must be 0 or more, got {begin}")
    if end <= begin:
        why = "has no step" if end == begin else "ends before it begins"
        raise RecipeError(f"gradual pruning from step {begin} to {end} {why}: end must be above begin")
    if not 1 <= every <= end - begin:
        raise RecipeError(f"gradual pruning: every must lie in 1..{end - begin}, the steps from begin to end; got {every}")
