"""What each ATen operation does to labels: one decorated function for each kind of operation.

A rule is called with the `Coupler` and the recorded `Node`; it ties labels that live or die together and returns, for each
output, the labels of its dimensions. Returning None stands for outputs nothing of which can be removed. An operation without
a rule freezes whatever touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.graph.couple import Coupler
    from secateur.graph.labels import Dim
    from secateur.graph.trace import Node, Value

Rule = Callable[["Coupler", "Node"], "list[list[Dim]] | None"]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations by name, without overload and in-place underscore.

    >>> @rule("my_activation")
    ... def pointwise(c, node):
    ...     return [c.labels_of(node.args[0])]
    """

    def add(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"operation {name!r} has two rules")
            RULES[name] = function
        return function

    return add


def nothing(values: Iterable[Value]) -> list[list[Dim]]:
    """Labels of values nothing of which can be removed."""
    return [[None] * v.ndim for v in values]
