"""Equations between sizes: which attributes must change with a cut, and which cuts no attribute can follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from secateur.graph.labels import Array
from secateur.graph.rewrite import Frames
from secateur.graph.sizes import OPERATORS, Expr


@dataclass(frozen=True, eq=False)
class Equation:
    """``left = right``, as the forward of `module` needs it. Beside sizes, an expression may be ``("count", labels)``."""

    left: Expr
    right: Expr
    module: str
    frames: Frames = ()  #: of the expression in a forward whose argument or operand number `argument` is written so
    argument: int = 0
    free: bool = False  #: whether that argument could as well be -1

    def __str__(self) -> str:
        return f"{text(self.left)} = {text(self.right)} in {self.module or 'the model itself'}"


Count = Callable[[Array], int]  #: how many of some labels are kept


def attributes_in(expr: Expr) -> Iterator[str]:
    """Names of the attributes in an expression."""
    if expr[0] == "attr":
        yield expr[1]
    elif expr[0] in OPERATORS:
        for part in expr[1:]:
            yield from attributes_in(part)


def counts_in(expr: Expr) -> Iterator[Array]:
    """Label arrays of which an expression counts what is kept."""
    if expr[0] == "count":
        yield expr[1]
    elif expr[0] == "dim":
        labels = expr[1].labels
        if labels is not None and labels[expr[2]] is not None:
            yield labels[expr[2]]
    elif expr[0] in OPERATORS:
        for part in expr[1:]:
            yield from counts_in(part)


def evaluate(expr: Expr, attributes: dict[str, int], old: dict[str, int], count: Count) -> int:
    """The value of an expression, with `attributes` in place of their `old` values."""
    kind = expr[0]
    if kind == "const":
        return expr[1]
    if kind == "attr":
        return attributes.get(expr[1], old[expr[1]])
    if kind == "count":
        return count(expr[1])
    if kind == "dim":
        labels = expr[1].labels
        own = labels[expr[2]] if labels is not None else None
        return count(own) if own is not None else expr[1].shape[expr[2]]
    left, right = (evaluate(part, attributes, old, count) for part in expr[1:])
    return OPERATORS[kind](left, right) if right or kind not in ("//", "%") else 0


def solve(equations: Iterable[Equation], old: dict[str, int], count: Count) -> tuple[dict[str, int], list[Equation]]:
    """New values of the attributes that must change, and the equations that cannot hold."""
    attributes: dict[str, int] = {}
    rest = list(equations)
    open_ = [(e, {a for side in (e.left, e.right) for a in attributes_in(side)}) for e in rest]
    open_ = [(e, names) for e, names in open_ if names]
    for final in (False, True):
        progress = True
        while progress:
            progress = False
            for equation, names in open_:
                free = [a for a in names if a not in attributes]
                simple = equation.left[0] == "attr" or equation.right[0] == "attr"
                if len(free) != 1 or not (simple or final):
                    continue
                if not simple and evaluate(equation.left, attributes, old, count) == evaluate(
                    equation.right, attributes, old, count
                ):
                    continue
                found = _invert(equation, attributes, old, count)
                if found is not None:
                    attributes[found[0]] = found[1]
                    progress = True
    wrong = [e for e in rest if evaluate(e.left, attributes, old, count) != evaluate(e.right, attributes, old, count)]
    return attributes, wrong


def _invert(equation: Equation, attributes: dict[str, int], old: dict[str, int], count: Count) -> tuple[str, int] | None:
    """The one unassigned attribute of an equation, and the value with which it holds."""
    for expr, other in ((equation.left, equation.right), (equation.right, equation.left)):
        if not any(a not in attributes for a in attributes_in(expr)):
            continue
        target = evaluate(other, attributes, old, count)
        while expr[0] in OPERATORS:
            kind, left, right = expr
            in_left = any(a not in attributes for a in attributes_in(left))
            known = evaluate(right if in_left else left, attributes, old, count)
            if kind == "+":
                target -= known
            elif kind == "*" and known and target % known == 0:
                target //= known
            elif kind == "-":
                target = target + known if in_left else known - target
            elif kind == "//" and in_left:
                target *= known
            elif kind == "//" and target and known % target == 0:
                target = known // target
            else:
                return None
            expr = left if in_left else right
        return expr[1], target
    return None


def text(expr: Expr) -> str:
    """An expression as people write it."""
    kind = expr[0]
    if kind in ("const", "attr"):
        return str(expr[1])
    if kind == "count":
        return f"kept of {len(expr[1])}"
    if kind == "dim":
        return f"size {expr[1].shape[expr[2]]}"
    return f"({text(expr[1])} {kind} {text(expr[2])})"
