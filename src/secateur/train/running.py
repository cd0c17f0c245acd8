"""Statistics that a training gives on the way: what the backward passes left in ``.grad``, gathered before each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from secateur.errors import TrainingError
from secateur.layers import Layer
from secateur.sharded import spread_like, whole
from secateur.types import Need

Values = Callable[[str], Tensor]  #: name of a parameter -> all its weights, those too that a mask hides


class Running:
    """Sums over the steps of an optimizer, one tensor for each layer and statistic; made for the statistics in `needs` only.

    Gradients and squared gradients are averaged over the steps since they were last taken; squares are of the gradient of a
    step's whole batch, not of each sample. Movement is summed from the beginning. `due` says whether the gradient of
    the step that begins will be wanted alone.
    """

    def __init__(self, layers: Mapping[str, Layer], needs: Collection[Need], values: Values, due: Callable[[], bool]):
        self._layers, self._values, self._due = layers, values, due
        self.needs = frozenset(n for n in needs if n.training and n is not Need.WEIGHT)
        self._sums: dict[Need, dict[str, Tensor]] = {need: {} for need in self.needs}
        self._steps = 0
        self._handle: Any = None

    def watch(self, optimizer: Optimizer) -> None:
        """Begin, where there is anything to gather."""
        if self.needs:
            self._handle = optimizer.register_step_pre_hook(self._before_step)

    def ignore(self) -> None:
        """End; what was gathered stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def take(self, name: str, layer: Layer, needs: Collection[Need]) -> dict[str, Tensor]:
        """Those of `needs` that are watched, of one layer: float32 in canonical orientation.

        Raises TrainingError where the layer had no gradient since masks were chosen last.
        """
        found: dict[str, Tensor] = {}
        for need in (n for n in self.needs if n in needs):
            sums = self._sums[need]
            if name not in sums:
                raise TrainingError(
                    f"gradients are needed ({need.value}), and {name!r} has none since masks were chosen last: call "
                    "backward() before optimizer.step(), and begin at 1 or later"
                )
            averaged = need in (Need.GRAD, Need.GRAD_SQ)
            total = whole(sums[name])
            found[need.value] = layer.canonical(total / self._steps if averaged else total)
        return found

    def clear(self) -> None:
        """Begin the averages anew. Movement goes on."""
        for need, sums in self._sums.items():
            if need is not Need.MOVEMENT:
                sums.clear()
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors for `load_state_dict`."""
        return {
            "steps": self._steps,
            **{need.value: {n: whole(t) for n, t in sums.items()} for need, sums in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._steps = int(state["steps"])
        for need in self.needs:
            given = state[need.value]
            self._sums[need] = {n: spread_like(given[n].clone(), self._layers[n].parameter) for n in given}

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # what a gradient scaler tells optimizers that unscale by themselves
        if skipped is not None and bool(skipped):
            return
        scale = getattr(optimizer, "grad_scale", None)
        self._steps += 1
        for name, layer in self._layers.items():
            grad = layer.parameter.grad
            if grad is not None:
                self._add(name, grad.float() if scale is None else grad.float() / scale)

    def _add(self, name: str, grad: Tensor) -> None:
        for need, sums in self._sums.items():
            if need is Need.GRAD_ONE:
                if self._due():
                    sums[name] = grad.clone()
                continue
            into = sums.get(name)
            if into is None:
                into = sums[name] = torch.zeros_like(grad)
            if need is Need.GRAD:
                into.add_(grad)
            elif need is Need.GRAD_SQ:
                into.addcmul_(grad, grad)
            else:
                into.addcmul_(grad, self._values(name).float(), value=-1.0)
