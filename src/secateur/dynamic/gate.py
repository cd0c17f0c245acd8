"""The gate: a part of a model that looks at its input before it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from secateur.dynamic.cost import Costs, Meter
from secateur.stats.replay import hooked


class Gate(nn.Module):
    """Takes the place of a part of a model, decides for each input what of it is computed, and computes that.

    What it learnt lies in its buffers, so that it is saved and loaded like any weight. Members of a batch may choose
    differently; each gets what it would get alone. Weights that are zero stay zero: a gate never changes them.
    """

    meter: Meter | None = None  #: there while somebody records costs

    def set_budget(self, budget: float) -> None:
        """Turn the dial: the share of this gate's dense multiply-adds that may be computed, in (0, 1]; 1 is the dense part.

        Raises BudgetError or RecipeError where that cannot be met; the dial then stays where it was.
        """
        raise NotImplementedError

    def spend(self, computed: Tensor, dense: Tensor) -> None:
        """Say what was computed for each input and what the dense part would have, in multiply-adds, ``[batch]`` each.

        Costs nothing to call where nobody records; ask ``self.meter is not None`` first where making the figures does.
        """
        if self.meter is not None:
            self.meter.add(computed, dense)


@contextmanager
def recording(model: nn.Module) -> Iterator[Costs]:
    """Inside, every call of `model` adds one entry for each of its inputs: what the gates in it spent."""
    meter, gates = Meter(), [module for module in model.modules() if isinstance(module, Gate)]
    handles = [
        model.register_forward_pre_hook(lambda _, args, kwargs: meter.begin(args, kwargs), with_kwargs=True),
        model.register_forward_hook(lambda *_: meter.end()),
    ]
    try:
        for gate in gates:
            gate.meter = meter
        with hooked(handles):
            yield meter.costs
    finally:
        for gate in gates:
            gate.meter = None
