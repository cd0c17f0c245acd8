"""Gradual pruning inside the user's own training loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.data.batches import Batch
from secateur.errors import RecipeError, TrainingError
from secateur.patterns import Units, make_pattern
from secateur.recipe import Recipe
from secateur.schedules import make_schedule
from secateur.sharded import whole
from secateur.stats.collect import layer_seed
from secateur.train.hold import Held, hold, innermost, unwrapped
from secateur.train.loop import mixed
from secateur.train.running import Running
from secateur.train.shadow import Shadow
from secateur.train.subjects import CutUnits, Subject, Weights
from secateur.types import LayerStats, MaskSet, Plan, Schedule

log = logging.getLogger("secateur")
#: Keys of a recipe that mean something in a training loop of the user's own; all others are refused.
_USED = frozenset({
    "version", "sparsity", "criterion", "reduction", "pattern", "allocation", "schedule", "regrow", "layers", "ignore", "seed",
})  # fmt: skip


def gradual(
    model: nn.Module,
    optimizer: Optimizer,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    end: int,
    begin: int = 0,
    every: int = 1,
    example: Batch | None = None,
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
        example: of patterns that cut units, a batch to follow through the model. Such units are masked, with all that
            depends on them, and `Gradual.cut` takes them out at the end.
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
    if unused := sorted(wanted.model_fields_set - _USED):
        raise RecipeError(
            f"gradual pruning happens in a training loop of yours: {', '.join(unused)} belong to sc.prune. Leave them out."
        )
    schedule = make_schedule(wanted.schedule if "schedule" in wanted.model_fields_set else "cubic")
    units = make_pattern(wanted.pattern)
    module = unwrapped(model)
    subject: Subject = (
        CutUnits(module, wanted, units, example) if isinstance(units, Units) else Weights(module, wanted, schedule)
    )
    return Gradual(module, innermost(optimizer), subject, wanted, schedule, (begin, end, every))


class Gradual:
    """A gradual pruning in progress; made by `gradual`.

    To go on with a stopped one, make it with the same arguments, call `load_state_dict`, and enter it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        subject: Subject,
        recipe: Recipe,
        schedule: Schedule,
        steps: tuple[int, int, int],
    ):
        self._model, self._optimizer, self._subject, self._recipe = model, optimizer, subject, recipe
        self._schedule = schedule
        self._begin, self._end, self._every = steps
        self._step = 0
        self._held: Held | None = None
        self._full: dict[str, Tensor] = {}
        self._running = Running(subject.layers, subject.needs, self._value, lambda: self._due(self._step + 1))

    @property
    def masks(self) -> MaskSet:
        """The masks in force: of weights, and of all that goes with removed outputs and units."""
        return self._subject.masks

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed so far, over the layers that are pruned; of the units, where units are."""
        return self._subject.sparsity()

    def cut(self) -> tuple[nn.Module, Plan]:
        """Of patterns that cut units: a smaller model without the units removed so far, and the plan for `sc.save`.

        The trained model stays as it is, masked. To go on with the smaller one, make a new optimizer for it.

        Raises RecipeError for patterns of weights, ModelError where the smaller model is not what the masked one is.
        """
        if not isinstance(self._subject, CutUnits):
            raise RecipeError(f"pattern {self._recipe.pattern!r} has masks, and no units that could be cut out")
        return self._subject.cut()

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
        made = {"layers": self._subject.names(), "masks": dict(self.masks), "full": dict(full), "running": running}
        return {"step": self._step, **self._plan(), **made, **self._subject.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises TrainingError where it is of another schedule or of other layers."""
        changed = [f"{key} was {state.get(key)}, is {now}" for key, now in self._plan().items() if state.get(key) != now]
        if changed:
            raise TrainingError(f"this state is of another gradual pruning: {'; '.join(changed)}. Use its settings to go on.")
        if other := set(state["layers"]) ^ set(self._subject.names()):
            raise TrainingError(f"this state is of other layers: {', '.join(sorted(other))} are in one and not in the other")
        self._step = int(state["step"])
        self._subject.restore(state["masks"], state)
        self._full = dict(state["full"])
        self._running.load_state_dict(state["running"])
        if isinstance(self._held, Shadow):
            self._held.restore(self.masks, self._full)
        elif self._held is not None:
            self._held.update(self.masks)

    def __enter__(self) -> Gradual:
        if self._subject.removed == "zero" or self._step >= self._end:
            self._held = hold(self._optimizer, self.masks, self._model)
        else:
            trained = self._subject.removed == "trained"
            self._held = Shadow(self._optimizer, self.masks, self._model, trained=trained, full=self._full)
        if self._step < self._end:
            self._running.watch(self._optimizer)
        if self._step == 0 == self._begin and self._schedule(0.0, self._subject.target) > 0.0:
            self._choose()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._held is not None:
            self._running.ignore()
            self._full = self._held.full if isinstance(self._held, Shadow) else {}
            self._held.release()
            self._held = None
        if kind is None and self._step < self._end:
            log.warning(
                "gradual pruning was left at step %d of %d with sparsity %.4f; its target %.4f was not reached",
                self._step,
                self._end,
                self.sparsity,
                self._subject.target,
            )

    def _plan(self) -> dict[str, Any]:
        steps = {"begin": self._begin, "end": self._end, "every": self._every}
        pieces = {key: getattr(self._recipe, key) for key in ("criterion", "pattern", "allocation", "regrow")}
        return {"sparsity": self._subject.target, **steps, **pieces}

    def _due(self, step: int) -> bool:
        """Whether masks are chosen after step number `step`, from 1."""
        since = step - self._begin
        return step == self._end or (since >= 0 and step < self._end and since % self._every == 0)

    def _value(self, name: str) -> Tensor:
        """All weights of a parameter, removed ones too where they are not lost."""
        if isinstance(self._held, Shadow):
            return self._held.value(name)
        return self._subject.layers[name].parameter.detach()

    def _choose(self) -> None:
        """New masks for the sparsity that the schedule wants now."""
        progress = (self._step - self._begin) / (self._end - self._begin)
        sparsity = self._schedule(progress, self._subject.target)
        if sparsity == 0.0:
            return
        masks = self._subject.choose(self._stats(), sparsity, progress, mixed(self._recipe.seed, "choose", self._step))
        assert self._held is not None
        self._held.update(masks)
        self._running.clear()
        if self._step == self._end:
            self._finish(masks)

    def _finish(self, masks: MaskSet) -> None:
        """The masks are final: nothing is watched any more, and removed weights are let go."""
        self._running.ignore()
        if isinstance(self._held, Shadow):
            self._held.release()
            self._held = hold(self._optimizer, masks, self._model)

    def _stats(self) -> dict[str, LayerStats]:
        stats = {}
        for name, layer in self._subject.layers.items():
            weight = layer.canonical(whole(self._value(name))).float()
            found: dict[str, Any] = self._running.take(name, layer, self._subject.needed())
            stats[name] = LayerStats(name, weight, seed=layer_seed(self._recipe.seed, name), **found)
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
