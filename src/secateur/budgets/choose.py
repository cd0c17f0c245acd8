"""From a recipe's budget to the units that every group keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.budgets.amount import parse_budget
from secateur.budgets.fit import Problem, fit
from secateur.budgets.path import in_scope
from secateur.graph import Graph, Group
from secateur.graph.choose import Scope, competitors
from secateur.types import Budget


def kept_within(
    budget: str | None,
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    scores: Mapping[int, Tensor],
    *,
    example: Any,
    scope: Scope,
    round_to: int = 1,
    min_width: int = 1,
) -> tuple[dict[int, int], Budget]:
    """Units that each group keeps, by id, so that `model` keeps to `budget`, and what that promises.

    `scope` says in which order units go: with ``local`` by one ratio, with ``isomorphic`` and ``global`` by a threshold among
    those that compete. Widths are as for `secateur.graph.kept_counts`. Raises RecipeError for a budget that is not understood,
    BudgetError for one that cannot be met.
    """
    amount = parse_budget(budget)
    rivals = competitors(graph, groups, scores)
    chosen = {g.id for c in rivals for g in c.groups}
    left_out = frozenset(m.tensor for g in graph.units() if g.id not in chosen for m in g.members)
    problem = Problem(model, graph, rivals, scores, in_scope(rivals, scope, round_to, min_width), left_out)
    return fit(problem, amount)
