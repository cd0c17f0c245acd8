"""From what a recipe asks for to the units that every group keeps, where more than a sparsity and scores decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from secateur.budgets.amount import parse_budget
from secateur.budgets.cost import Cost, cost_of
from secateur.budgets.fit import Problem, fit
from secateur.budgets.latency import Stopwatch, fit_latency
from secateur.budgets.path import Step, by_gain, by_key, counts, in_scope, shortest
from secateur.data.batches import Batch
from secateur.errors import RecipeError
from secateur.graph import Graph, Group
from secateur.graph.choose import Competitor, Scope, competitors, named
from secateur.measure.sensitivity import damages
from secateur.select import removed_count
from secateur.types import Budget, Sensitivity


def choose_counts(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    scores: Mapping[int, Tensor],
    *,
    target: float | str,
    scope: Scope | Literal["gain"] | Sequence[Sensitivity],
    example: Batch,
    round_to: int = 1,
    min_width: int = 1,
) -> tuple[dict[int, int], Budget | None]:
    """Units that each group keeps, by id, and of a budget what it promises.

    `target` is a sparsity of the units or a budget as text. `scope` says in which order units go: ``local`` by one ratio,
    ``isomorphic`` and ``global`` by a threshold among those that compete, ``gain`` so that the least score is lost for what is
    saved of a budget (see `path.by_gain`), and by sensitivity curves so that every group is taken to the same damage. Widths
    are as for `secateur.graph.kept_counts`. Raises RecipeError for a budget that is not understood or a group without a
    curve, BudgetError for a budget that cannot be met.
    """
    rivals = competitors(graph, groups, scores)
    if scope == "gain":
        steps: list[Step] = []  # they follow when the cost is known
    elif isinstance(scope, str):
        steps = in_scope(rivals, scope, round_to, min_width)
    else:
        steps = by_damage(rivals, scope, round_to, min_width)
    if not isinstance(target, str):
        return _by_number(rivals, steps, target), None
    chosen = {g.id for c in rivals for g in c.groups}
    left_out = frozenset(m.tensor for g in graph.units() if g.id not in chosen for m in g.members)
    problem = Problem(model, graph, rivals, scores, steps, left_out)

    def order(cost: Cost) -> Sequence[Step]:
        return by_gain(rivals, [_layers(graph, c) for c in rivals], cost, round_to, min_width) if scope == "gain" else steps

    amount = parse_budget(target)
    if amount.unit == "ms":
        return fit_latency(problem, amount, Stopwatch(model, example), order)
    if scope == "gain":
        problem = replace(problem, steps=order(cost_of(model, graph, problem.widths(), amount.unit)))
    return fit(problem, amount)


def _layers(graph: Graph, competitor: Competitor) -> int:
    """How many weights its units have slices in."""
    tensors = {m.tensor for g in competitor.groups for m in g.members}
    return sum(graph.recording.values[t].ndim >= 2 for t in tensors)


def by_damage(rivals: Sequence[Competitor], curves: Sequence[Sensitivity], round_to: int, min_width: int) -> list[Step]:
    """The order in which the step goes next that leaves its group least damaged, by the group's sensitivity curve."""
    found, names = damages(curves), {id(c): name for name, c in named(rivals).items()}
    if missing := [name for name in names.values() if name not in found]:
        raise RecipeError(
            f"there is no sensitivity curve of {missing[0]!r} ({len(missing)} of {len(names)} groups have none): "
            "scan with the same pattern, layers and ignore."
        )
    return by_key(rivals, lambda step: found[names[id(step.of)]].at(1 - step.after / step.of.units), round_to, min_width)


def _by_number(rivals: Sequence[Competitor], steps: Sequence[Step], sparsity: float) -> dict[int, int]:
    """As many steps as remove the fraction `sparsity` of all units, or a little more where steps are long."""
    full = counts(rivals)
    total = sum(full.values())
    n = shortest(steps, lambda kept: sum(kept.values()), full, total - removed_count(total, sparsity))
    return counts(rivals, steps[:n] if n >= 0 else steps)
