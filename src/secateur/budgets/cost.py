"""Parameters, multiply-adds and bytes of a model after a cut, from the recorded forward alone: nothing is run or copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.budgets.widths import Extent, Length, Widths, size
from secateur.graph import Graph
from secateur.graph.trace import Node, Value
from secateur.measure.macs import products

Shape = tuple[Extent, ...]


@dataclass(eq=False)
class Term:
    """One summand of a cost: what it is for given shapes, and the shapes as functions of the units kept."""

    name: str  #: the tensor or the module it belongs to
    shapes: tuple[Shape, ...]
    formula: Callable[[Sequence[tuple[int, ...]]], float]
    groups: frozenset[int] = field(init=False)
    _known: dict[tuple[tuple[int, ...], ...], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = frozenset(g for s in self.shapes for n in s if isinstance(n, Length) for g in n.groups)

    def __call__(self, kept: Mapping[int, int]) -> float:
        """The summand when group g keeps ``kept[g]`` units."""
        shapes = tuple(tuple(size(n, kept) for n in shape) for shape in self.shapes)
        if shapes not in self._known:
            self._known[shapes] = self.formula(shapes)
        return self._known[shapes]


class Cost:
    """What a model costs when every group keeps a given number of units: a sum of terms, each of a few groups."""

    def __init__(self, terms: Iterable[Term]):
        self.terms = tuple(terms)
        self._fixed = sum(t({}) for t in self.terms if not t.groups)
        self._free = [t for t in self.terms if t.groups]
        self._of_group: dict[int, list[Term]] = {}
        for term in self._free:
            for g in term.groups:
                self._of_group.setdefault(g, []).append(term)

    def __call__(self, kept: Mapping[int, int]) -> float:
        """The cost when group g keeps ``kept[g]`` units."""
        return self._fixed + sum(term(kept) for term in self._free)

    def change(self, kept: Mapping[int, int], changes: Mapping[int, int]) -> float:
        """How much more it costs when `changes` are made to `kept`."""
        terms = {id(t): t for g in changes for t in self._of_group.get(g, ())}.values()
        after = {**kept, **changes}
        return sum(term(after) - term(kept) for term in terms)


def cost_of(model: nn.Module, graph: Graph, widths: Widths, unit: str) -> Cost:
    """The cost of `model` in ``params``, ``bytes`` or ``MACs``, exactly as `sc.measure` counts them on the cut model."""
    if unit == "MACs":
        return Cost(macs_terms(graph, widths))
    return Cost(_tensor_terms(model, graph, widths, in_bytes=unit == "bytes"))


def _tensor_terms(model: nn.Module, graph: Graph, widths: Widths, *, in_bytes: bool) -> Iterator[Term]:
    """Each parameter once, under the name it was recorded by; with `in_bytes` each buffer too."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if in_bytes:
        tensors |= dict(model.named_buffers())
    recorded = graph.recording.values
    for name, tensor in tensors.items():
        each = tensor.element_size() if in_bytes else 1
        shape = widths.of(recorded[name]) if name in recorded else tuple(tensor.shape)
        yield Term(name, (shape,), partial(_elements, each))


def _elements(each: int, shapes: Sequence[tuple[int, ...]]) -> int:
    return each * math.prod(shapes[0])


def macs_terms(graph: Graph, widths: Widths) -> Iterator[Term]:
    """Each recorded operation that multiplies and adds."""
    for node in graph.recording.nodes:
        values = values_of(node)
        formula = _Products(node, values)
        if formula([v.shape for v in values]):
            yield Term(node.module, tuple(widths.of(v) for v in values), formula)


def multiply_adds(node: Node) -> float:
    """Multiply-adds of one recorded operation."""
    values = values_of(node)
    return _Products(node, values)([v.shape for v in values])


def values_of(node: Node) -> list[Value]:
    """Every tensor that an operation was given or gave, once."""
    found = pytree.tree_leaves((node.args, node.kwargs, node.outputs))
    return list(dict.fromkeys(v for v in found if isinstance(v, Value)))


class _Products:
    """Multiply-adds of one operation at other shapes, by the formulas that count the operations of a real run."""

    def __init__(self, node: Node, values: Sequence[Value]):
        self._node, self._values = node, values

    def __call__(self, shapes: Sequence[tuple[int, ...]]) -> float:
        stand_in = {v: torch.empty(s, dtype=v.dtype, device="meta") for v, s in zip(self._values, shapes, strict=True)}

        def fill(tree: Any) -> Any:
            return pytree.tree_map_only(Value, stand_in.__getitem__, tree)

        node = self._node
        out = fill(node.outputs)
        given = products(node.op._overloadpacket, fill(node.args), fill(node.kwargs), out[0] if len(out) == 1 else out)
        return sum(count for count, _ in given)
