"""`dynamic`, and the module that it returns."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from secateur.data.batches import Batch, Batches
from secateur.dynamic.around import Around
from secateur.dynamic.cost import Costs
from secateur.dynamic.curve import dial_report
from secateur.dynamic.gate import Gate, recording
from secateur.dynamic.registry import DYNAMIC, Method, Preparing
from secateur.errors import ArtifactError, ModelError, RecipeError
from secateur.measure.modes import evaluating
from secateur.measure.quality import Evaluate
from secateur.registry import bind
from secateur.types import Report


class Dynamic(Around):
    """A model with gates, called like the model itself. Made by `dynamic` or by `sc.load`.

    Attributes that it lacks (``config``, ``generate``, ...) are those of the model inside, ``gated.model``.
    """

    def __init__(self, model: nn.Module, method: str, options: Mapping[str, Any] | None = None, budget: float = 1.0):
        super().__init__()
        _check_ungated(model)
        self.method, self.options = method, dict(options or {})
        self.model = make(method, self.options).attach(model)
        if not self.gates:
            raise ModelError(f"the method {method!r} found nothing to gate in a {type(model).__name__}")
        self._budget = _checked(budget)

    @property
    def gates(self) -> dict[str, Gate]:
        """The gates by their names in the model, each once."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Gate)}

    @property
    def budget(self) -> float:
        """The share of the dense multiply-adds of the gated parts that may be computed, on average over the calibration data.

        In (0, 1], where 1 is the dense model. It can be set at any time. Raises RecipeError for a value out of range, and
        BudgetError where a gate cannot do with so little; then nothing has changed.
        """
        return self._budget

    @budget.setter
    def budget(self, value: float) -> None:
        value, gates = _checked(value), self.gates.values()
        try:
            for gate in gates:
                gate.set_budget(value)
        except RecipeError:
            for gate in gates:
                gate.set_budget(self._budget)
            raise
        self._budget = value

    @property
    def facts(self) -> dict[str, Any]:
        """What `rebuild` needs beside the tensors, as plain JSON."""
        return {"method": self.method, "options": self.options, "budget": self.budget}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model."""
        return self.model(*args, **kwargs)

    def recording(self) -> AbstractContextManager[Costs]:
        """Inside, every call of the model (also from its own ``generate``) adds one entry for each of its inputs.

        >>> with gated.recording() as costs:                             # doctest: +SKIP
        ...     gated(x)
        >>> print(costs.mean, costs.shares)                              # doctest: +SKIP
        """
        return recording(self.model)

    def report(
        self, evaluate: Evaluate, *, budgets: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), title: str | None = None
    ) -> Report:
        """Quality and the cost of every input along the dial, as a report: give it to `sc.save`, then `secateur report DIR`.

        >>> sc.save(gated, "runs/gated", report=gated.report(accuracy))  # doctest: +SKIP
        """
        return dial_report(self, evaluate, budgets, title or f"{type(self.model).__name__} with {self.method}")

    def extra_repr(self) -> str:
        """Method and budget."""
        return f"{self.method}, budget={self.budget}"


def dynamic(
    model: nn.Module,
    *,
    method: str = "teal",
    data: Iterable[Batch],
    budget: float = 0.6,
    inplace: bool = False,
    **options: Any,
) -> Dynamic:
    """Let the input decide what of `model` is computed. Returns a `Dynamic`, which is called like the model.

    `method` is a name of ``secateur methods "dynamic method"``, and `options` are that method's; `data` is an iterable of
    batches from which its gates learn. `budget` is the share of the dense multiply-adds of the gated parts that may be
    computed, in (0, 1]; it can be set again later. The model given is left untouched, unless ``inplace=True`` saves
    the copy. Masks of `sc.prune` hold: what is zero stays zero.

    Raises RecipeError for an unknown method or option and a budget out of range, ModelError for a model with nothing to gate,
    and DataError for data without batches.

    >>> gated = dynamic(model, method="teal", data=batches, budget=0.6)  # doctest: +SKIP
    >>> gated.budget = 0.5                                               # doctest: +SKIP
    """
    batches, budget = Batches(data), _checked(budget)
    made = make(method, options)  # refuses bad options before a large model is copied
    _check_ungated(model)
    model = model if inplace else copy.deepcopy(model)
    if isinstance(made, Preparing):
        with evaluating(model), torch.no_grad():
            options = {**options, **made.prepare(model, batches)}
    gated = Dynamic(model, method, options)
    with evaluating(gated):
        make(method, options).calibrate(gated.model, batches)
    gated.budget = budget
    return gated.eval()


def rebuild(model: nn.Module, facts: Any) -> Dynamic:
    """`model` with the gates that `facts` (of `Dynamic.facts`) tell of, before their tensors are filled in. In place.

    Raises ArtifactError for facts that no `Dynamic` wrote, and for a model they do not fit.
    """
    try:
        method, options, budget = facts["method"], facts["options"], facts["budget"]
        return Dynamic(model, method, options, budget)
    except (KeyError, TypeError, AttributeError, RecipeError, ModelError) as error:
        raise ArtifactError(f"the gates of the artifact cannot be made for this model: {error}") from error


def make(method: str, options: Mapping[str, Any]) -> Method:
    """The method `method` with its options bound and checked."""
    return bind(DYNAMIC, {**options, "name": method})[1]()


def _check_ungated(model: nn.Module) -> None:
    if any(isinstance(module, Gate) for module in model.modules()):
        raise ModelError("the model has gates already: give the model from before them")


def _checked(budget: float) -> float:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not math.isfinite(budget) or not 0 < budget <= 1:
        raise RecipeError(
            f"the budget {budget!r} is out of range: it is the share of the gated multiply-adds that may be computed, "
            "more than 0 and at most 1"
        )
    return float(budget)
