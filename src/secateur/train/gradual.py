"""Gradual pruning inside the user's own training loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import RecipeError, TrainingError
from secateur.recipe import Recipe
from secateur.schedules import make_schedule
from secateur.selection import Method, prunable, resolve, target_sparsity
from secateur.sharded import whole
from secateur.stats.collect import layer_seed
from secateur.train.hold import Held, hold, innermost, unwrapped
from secateur.train.loop import mixed
from secateur.train.regrow import REGROW, Choice, make_regrow
from secateur.train.running import Running
from secateur.train.shadow import Shadow
from secateur.types import LayerStats, MaskSet

log = logging.getLogger("secateur")


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

    A context manager. Call its ``step()`` after each ``optimizer.step()``. At steps `begin`, ``begin + every``, ... and `end`
    new masks are chosen, so that `sparsity` is reached at `end` exactly; between them, and afterwards until the block ends,
    masks are held as by `hold`. What is removed stays removed, unless `regrow` names a rule by which it comes back until
    `end`: ``"splice"`` (Dynamic Network Surgery), ``"rigl"``, ``"set"``, or ``"frozen"`` (movement pruning).

    Args:
        model: what is trained; it may be compiled or wrapped by DistributedDataParallel.
        optimizer: the one that trains it.
        end: step at which the target is reached.
        begin: step at which pruning begins, at progress 0 of the schedule.
        every: steps between two choices; weights need some to recover, 100 in large trainings.
        recipe: a `Recipe`, a mapping, or the path of a TOML or JSON file. Its schedule is cubic where it names none.
        changes: any key of the recipe, laid over it: ``sparsity=0.9, criterion="taylor", ignore=["head"], ...``. The criterion
            is of weights, or of what the backward passes give on the way: gradients and their squares, averaged over the
            steps since the last choice, and movement.

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
    if beyond := sorted(need.value for need in method.needs if not need.training):
        raise RecipeError(
            f"criterion {method.criterion_name!r} needs {', '.join(beyond)}, which a training step does not give. "
            "Choose one of weights or gradients for gradual pruning, or use sc.prune with several steps."
        )
    return Gradual(unwrapped(model), innermost(optimizer), method, wanted, (begin, end, every))


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
        self._masks = MaskSet({n: _all_kept(layer.parameter) for n, layer in self._layers.items()})
        self._step = 0
        self._held: Held | None = None
        self._full: dict[str, Tensor] = {}
        self._regrow_name, self._regrow = make_regrow(recipe.regrow)
        self._facts = REGROW[self._regrow_name].facts
        needs = method.needs | self._facts["needs"]
        self._running = Running(self._layers, needs, self._value, lambda: self._due(self._step + 1))

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

        Raises TrainingError outside the ``with`` block, or where gradients are needed and no backward pass gave any;
        NonFiniteError where weights or gradients are NaN or infinite.
        """
        if self._held is None:
            raise TrainingError("gradual pruning holds masks only inside its block: with sc.gradual(...) as pruner: ...")
        self._step += 1
        if self._due(self._step):
            self._choose()

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors from which `load_state_dict` goes on; save it with the model's and the optimizer's."""
        full = self._held.full if isinstance(self._held, Shadow) else self._full
        running = self._running.state_dict()
        return {"step": self._step, **self._plan(), "masks": dict(self._masks), "full": dict(full), "running": running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises TrainingError where it is of another schedule or of other layers."""
        changed = [f"{key} was {state.get(key)}, is {now}" for key, now in self._plan().items() if state.get(key) != now]
        if changed:
            raise TrainingError(f"this state is of another gradual pruning: {'; '.join(changed)}. Use its settings to go on.")
        biases = {layer.bias for layer in self._layers.values()}
        if other := set(state["masks"]) - biases ^ set(self._layers):
            raise TrainingError(f"this state is of other layers: {', '.join(sorted(other))} are in one and not in the other")
        self._step = int(state["step"])
        self._masks, self._full = MaskSet(state["masks"]), dict(state["full"])
        self._running.load_state_dict(state["running"])
        if isinstance(self._held, Shadow):
            self._held.restore(self._masks, self._full)
        elif self._held is not None:
            self._held.update(self._masks)

    def __enter__(self) -> Gradual:
        if self._facts["removed"] == "zero" or self._step >= self._end:
            self._held = hold(self._optimizer, self._masks, self._model)
        else:
            trained = self._facts["removed"] == "trained"
            self._held = Shadow(self._optimizer, self._masks, self._model, trained=trained, full=self._full)
        self._watching = self._running.watch(self._optimizer)
        if self._step == 0 == self._begin and self._schedule(0.0, self._target) > 0.0:
            self._choose()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._held is not None:
            self._watching.remove()
            self._full = self._held.full if isinstance(self._held, Shadow) else {}
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

    def _plan(self) -> dict[str, Any]:
        steps = {"begin": self._begin, "end": self._end, "every": self._every}
        return {"sparsity": self._target, **steps, "regrow": self._regrow_name}

    def _due(self, step: int) -> bool:
        """Whether masks are chosen after step number `step`, from 1."""
        since = step - self._begin
        return step == self._end or (since >= 0 and step < self._end and since % self._every == 0)

    def _value(self, name: str) -> Tensor:
        """All weights of a parameter, removed ones too where they are not lost."""
        if isinstance(self._held, Shadow):
            return self._held.value(name)
        return self._layers[name].parameter.detach()

    def _choose(self) -> None:
        """New masks for the sparsity that the schedule wants now."""
        progress = (self._step - self._begin) / (self._end - self._begin)
        sparsity = self._schedule(progress, self._target)
        if sparsity == 0.0:
            return
        seed = mixed(self._seed, "choose", self._step)
        choice = Choice(self._layers, self._stats(), self._method, sparsity, self._masks, progress, seed)
        masks = self._regrow(choice)
        assert self._held is not None
        self._held.update(masks)
        self._masks = masks
        self._running.clear()
        if self._step == self._end and isinstance(self._held, Shadow):
            self._held.release()
            self._held = hold(self._optimizer, masks, self._model)

    def _stats(self) -> dict[str, LayerStats]:
        stats = {}
        needed = self._method.needs | (self._facts["needs"] if not all(m.all() for m in self._masks.values()) else set())
        for name, layer in self._layers.items():
            weight = layer.canonical(whole(self._value(name))).float()
            found: dict[str, Any] = self._running.take(name, layer, needed)
            stats[name] = LayerStats(name, weight, seed=layer_seed(self._seed, name), **found)
        return stats


def _all_kept(parameter: Tensor) -> Tensor:
    return torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)


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
