"""Gradual pruning inside the user's own training loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.errors import RecipeError, TrainingError
from secateur.recipe import Recipe
from secateur.schedules import make_schedule
from secateur.selection import Method, choose, prunable, resolve, target_sparsity
from secateur.stats import collect
from secateur.train.hold import Held, hold, unwrapped
from secateur.types import LayerStats, MaskSet, Need

log = logging.getLogger("secateur")
_FROM_BACKWARD = {Need.GRAD, Need.GRAD_ONE}  #: what a training step leaves in ``.grad``


def gradual(
    model: nn.Module,
    optimizer: Optimizer,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    end: int,
    begin: int = 0,
    every: int = 1,
    **changes: Any,
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
        recipe: a `Recipe`, a mapping, or the path of a TOML or JSON file. Its schedule is cubic where it names none.
        changes: any key of the recipe, laid over it: ``sparsity=0.9, criterion="taylor", ignore=["head"], ...``. The criterion
            is of weights, or of weights and the gradients that the last backward left in ``.grad``.

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
    wanted = Recipe.make(recipe, **changes)
    if unused := sorted(wanted.model_fields_set & {"steps", "solver", "finetune", "reestimate_norms", "budget"}):
        raise RecipeError(
            f"gradual pruning happens in a training loop of yours: {', '.join(unused)} belong to sc.prune. Leave them out."
        )
    method = resolve(
        criterion=wanted.criterion, pattern=wanted.pattern, allocation=wanted.allocation, reduction=wanted.reduction
    )
    if beyond := sorted(need.value for need in method.needs - _FROM_BACKWARD if need.data or need is Need.SYNFLOW_GRAD):
        raise RecipeError(
            f"criterion {method.criterion_name!r} needs {', '.join(beyond)}, which a training step does not give. "
            "Choose one of weights or gradients for gradual pruning, or use sc.prune with several steps."
        )
    return Gradual(unwrapped(model), optimizer, method, wanted, (begin, end, every))


class Gradual:
    """A gradual pruning in progress; made by `gradual`.

    To go on with a stopped one, make it with the same arguments, call `load_state_dict`, and enter it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: Method, recipe: Recipe, steps: tuple[int, int, int]):
        self._model, self._optimizer, self._method, self._seed = model, optimizer, method, recipe.seed
        self._begin, self._end, self._every = steps
        target = self._target = target_sparsity(recipe.sparsity, method.pattern)
        schedule = recipe.schedule if "schedule" in recipe.model_fields_set else "cubic"
        self._schedule = make_schedule(schedule)
        if method.pattern.sparsity is not None and self._schedule(0.0, target) != target:
            raise RecipeError(
                f"pattern {method.pattern.name} has one sparsity and nothing in between, so it cannot grow along schedule "
                f"{schedule!r}. Use a schedule that prunes at once, at begin."
            )
        self._layers, _ = prunable(model, method.pattern, layers=recipe.layers, ignore=recipe.ignore)
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
