"""Cut, and check: no model comes out of a cut that was not compared with its original on the example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import ModelError
from secateur.graph.blocks import bypass_difference, plan_without
from secateur.graph.cut import cut
from secateur.graph.graph import Graph, trace
from secateur.graph.verify import TOLERANCE, difference
from secateur.types import Plan


@dataclass(frozen=True)
class Checked:
    """A cut model, what it was compared with, and how far its outputs are from those, relative to the largest."""

    model: nn.Module
    difference: float
    against: str


def cut_checked(model: nn.Module, plan: Plan, graph: Graph, removed: Mapping[int, Iterable[int]], example: Any) -> Checked:
    """A cut copy of `model`, compared on the example with the original in which the same is masked or bypassed.

    `removed` are the units that the plan takes out, by group of `graph`; none where it takes out whole blocks. Raises
    ModelError where the outputs differ by more than rounding: `model` is as it was.
    """
    smaller = cut(model, plan)
    if plan.dropped:
        error, against = bypass_difference(model, smaller, plan, example), "original with the blocks bypassed"
    else:
        error, against = difference(model, smaller, graph, graph.flags(removed), example), "masked original"
    if not error <= TOLERANCE:
        raise ModelError(
            f"the cut model differs from the {against} by {error:.2g} (relative); at most {TOLERANCE:g} is rounding. "
            "Nothing was changed. Leave out what does not follow the cut with ignore=, and report the model."
        )
    return Checked(smaller, error, against)


def drop_blocks(model: nn.Module, example: Any, names: Iterable[str]) -> tuple[nn.Module, Plan]:
    """A copy of `model` without the named blocks, and the plan; compared on the example with the original that bypasses them.

    Raises ModelError where that fails: a block may hold what others use (T5 keeps its position bias in the first).
    """
    graph = trace(model, example)
    plan = plan_without(graph, model, names)
    return cut_checked(model, plan, graph, {}, example).model, plan
