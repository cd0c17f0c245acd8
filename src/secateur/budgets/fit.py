"""Which units stay so that the model keeps to its budget: as close to it as whole units allow, and never above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.budgets.amount import Amount
from secateur.budgets.cost import Cost, cost_of
from secateur.budgets.path import Step, counts, refill, shortest
from secateur.budgets.widths import Widths
from secateur.errors import BudgetError
from secateur.graph import Graph
from secateur.graph.choose import Competitor
from secateur.types import Budget


@dataclass(frozen=True)
class Problem:
    """A model whose units compete, in the order in which they go.

    `steps` is that order, all the way down to the least that may stay; `scores [units]` by group say which units of a group go.
    """

    model: nn.Module
    graph: Graph
    competitors: Sequence[Competitor]
    scores: Mapping[int, Tensor]
    steps: Sequence[Step]
    ignored: frozenset[str] = frozenset()  #: tensors that the user asked to leave alone

    @property
    def full(self) -> dict[int, int]:
        """What every group keeps of itself in the dense model."""
        return counts(self.competitors)

    def widths(self) -> Widths:
        """Lengths of all dimensions, by the units kept."""
        return Widths(self.graph, [g for c in self.competitors for g in c.groups], self.scores)


def fit(problem: Problem, amount: Amount) -> tuple[dict[int, int], Budget]:
    """Units that each group keeps, by id, so that parameters, bytes or MACs stay within `amount`; and what that promises.

    As many steps are taken as it needs; then those are taken back, last ones first, for which there is room after all, until
    not one more would fit. The promise is exact: it is what the cut model has. Raises BudgetError where all steps together are
    not enough.
    """
    cost = cost_of(problem.model, problem.graph, problem.widths(), amount.unit)
    full = problem.full
    dense = cost(full)
    limit = amount.limit(dense)
    n = shortest(problem.steps, cost, full, limit)
    if n < 0:
        least = counts(problem.competitors, problem.steps)
        raise BudgetError(amount.text, amount.unit, limit, cost(least), dense, *constraints(problem, cost, least))
    kept = refill(problem.steps[:n], cost, counts(problem.competitors, problem.steps[:n]), limit)
    return kept, Budget(amount.text, amount.unit, dense, limit, cost(kept))


def constraints(problem: Problem, cost: Cost, least: Mapping[int, int]) -> list[str]:
    """What keeps the model from being cheaper than it is with the units `least`: widths that may not fall, layers not cut."""
    found = []
    ones = {g: min(n, 1) for g, n in least.items()}
    if (lower := cost(ones)) < cost(least):
        held = max(problem.competitors, key=lambda c: max(least[g.id] for g in c.groups))
        found.append(
            f"widths stay at min_width and at multiples of round_to ({held.groups[0].name!r} at {least[held.groups[0].id]}); "
            f"at 1 everywhere it would be {lower:,.0f}"
        )
    fixed = sorted(((term({}), term.name) for term in cost.terms if not term.groups), reverse=True)
    if fixed and (total := sum(n for n, _ in fixed)):
        names = "; ".join(f"{name!r} {n:,.0f} ({_why(problem, name)})" for n, name in fixed[:3])
        found.append(f"{total:,.0f} are in layers that are not cut: {names}")
    return found


def _why(problem: Problem, name: str) -> str:
    """Why a layer, or a tensor, is not cut."""

    def belongs(tensor: str) -> bool:
        return tensor == name or tensor.startswith(f"{name}.")

    if any(belongs(t) for t in problem.ignored):
        return "left out by ignore or layers"
    reasons = (g.reason for g in problem.graph.groups if g.reason and any(belongs(m.tensor) for m in g.members))
    return next(reasons, "no unit of this pattern is in it")
