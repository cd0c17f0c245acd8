"""A table of measured times: every operation of the forward at several widths, and between them by interpolation."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.budgets.cost import Cost, Term, values_of
from secateur.budgets.widths import Length, Widths
from secateur.graph import Graph
from secateur.graph.trace import Node, Value
from secateur.progress import track

#: Times one call of an operation, in milliseconds.
Timer = Callable[[Callable[[], Any]], float]
Shapes = tuple[tuple[int, ...], ...]

#: Operations that are timed, beside those that work element by element. What is left out costs the same after a cut, or little.
_TIMED = frozenset({
    "convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm", "_fused_rms_norm",
    "_softmax", "mean", "sum", "cat", "clone", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d",
})  # fmt: skip
_SHARES = (0.125, 0.25, 0.5, 0.75)
_MULTIPLE = 8  # kernels have steps at such widths: times are taken on them where there are enough


@dataclass(frozen=True, eq=False)
class _Operation:
    """One recorded operation that can be run at other shapes."""

    node: Node
    values: tuple[Value, ...]

    def key(self, shapes: Shapes) -> Any:
        """Equal for calls that take the same time."""
        number = {v: i for i, v in enumerate(self.values)}
        static = repr(pytree.tree_map_only(Value, lambda v: ("tensor", number[v]), (self.node.args, self.node.kwargs)))
        return self.node.op, static, shapes, tuple(v.dtype for v in self.values)

    def prepared(self, shapes: Shapes, device: torch.device) -> Callable[[], Any]:
        """The call, on tensors of these shapes."""
        made = {v: _filled(s, v.dtype, device) for v, s in zip(self.values, shapes, strict=True)}
        args, kwargs = pytree.tree_map_only(Value, made.__getitem__, (list(self.node.args), self.node.kwargs))
        _follow(self.node.name, args)
        op = self.node.op
        return lambda: op(*args, **kwargs)


def _filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, 0.5 if dtype.is_floating_point else 0, dtype=dtype, device=device)


def _follow(name: str, args: list[Any]) -> None:
    """Numbers among the arguments that say what the shapes say are brought in line with them."""
    if name == "convolution" and not args[6]:
        args[8] = args[0].shape[1] // args[1].shape[1]
    elif name in ("native_layer_norm", "_fused_rms_norm"):
        args[1] = list(args[0].shape[args[0].ndim - len(args[1]) :])
    elif name == "native_group_norm":
        batch, channels = args[0].shape[:2]
        args[3:7] = [batch, channels, args[0].numel() // (batch * channels), math.gcd(channels, args[6])]


class _Curve:
    """Milliseconds of one operation over the lengths of its dimensions that change: measured on a grid, linear between.

    With more than two such dimensions they are taken to shrink together, by the number of values in all tensors.
    """

    def __init__(self, operation: _Operation, shapes: Sequence[tuple[Length | int, ...]]):
        self._operation = operation
        self._where: dict[Length, list[tuple[int, int]]] = {}
        for i, shape in enumerate(shapes):
            for d, n in enumerate(shape):
                if isinstance(n, Length):
                    self._where.setdefault(n, []).append((i, d))
        self._dense = [tuple(n.full if isinstance(n, Length) else n for n in shape) for shape in shapes]
        self._grids = [_grid(length.full) for length in self._where]
        self._together = len(self._grids) > 2
        self.ms: dict[tuple[int, ...], float] = {}

    def points(self) -> Iterator[tuple[tuple[int, ...], Shapes]]:
        """Where it has to be measured: grid indices and shapes."""
        sides = [range(len(g)) for g in self._grids]
        at = zip(*_even(self._grids), strict=True) if self._together else itertools.product(*sides)
        for indices in at:
            yield indices, self._shapes([g[i] for g, i in zip(self._grids, indices, strict=True)])

    def operation(self) -> _Operation:
        """What is measured."""
        return self._operation

    def _shapes(self, lengths: Sequence[int]) -> Shapes:
        shapes = [list(s) for s in self._dense]
        for places, n in zip(self._where.values(), lengths, strict=True):
            for i, d in places:
                shapes[i][d] = n
        return tuple(map(tuple, shapes))

    def __call__(self, shapes: Sequence[tuple[int, ...]]) -> float:
        if self._together:
            return self._by_size(sum(map(math.prod, shapes)))
        lengths = [shapes[places[0][0]][places[0][1]] for places in self._where.values()]
        cells = [_cell(grid, n) for grid, n in zip(self._grids, lengths, strict=True)]
        total = 0.0
        for corner in itertools.product((0, 1), repeat=len(cells)):
            weight = math.prod(t if up else 1 - t for (_, t), up in zip(cells, corner, strict=True))
            if weight:
                total += weight * self.ms[tuple(i + up for (i, _), up in zip(cells, corner, strict=True))]
        return max(total, 0.0)

    def _by_size(self, size: int) -> float:
        found = sorted((sum(map(math.prod, shapes)), self.ms[at]) for at, shapes in self.points())
        i, t = _cell([s for s, _ in found], size)
        return max((1 - t) * found[i][1] + t * found[i + 1][1], 0.0) if len(found) > 1 else found[0][1]


def _grid(full: int) -> list[int]:
    """Lengths at which times are taken, ascending."""
    step = _MULTIPLE if full >= 4 * _MULTIPLE else 1
    return sorted({1, full, *(max(round(full * s / step), 1) * step for s in _SHARES)})


def _even(grids: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each grid as many indices as the longest has, spread evenly: all shrink together."""
    most = max(map(len, grids))
    return [[round(i * (len(g) - 1) / max(most - 1, 1)) for i in range(most)] for g in grids]


def _cell(grid: Sequence[int], n: int) -> tuple[int, float]:
    """Index of the grid's interval in which `n` lies, and how far along; beyond the ends the last interval goes on."""
    if len(grid) == 1:
        return 0, 0.0
    i = min(max(bisect.bisect_right(grid, n) - 1, 0), len(grid) - 2)
    return i, (n - grid[i]) / (grid[i + 1] - grid[i])


def latency_table(graph: Graph, widths: Widths, timer: Timer, device: torch.device) -> Cost:
    """The milliseconds of all operations whose shapes change with the cut, as a cost: each timed at up to 6 lengths of each
    dimension on tensors of the real shapes. Calls that take the same time are timed once.
    """
    terms, curves = [], []
    for node in graph.recording.nodes:
        values = tuple(values_of(node))
        shapes = tuple(widths.of(v) for v in values)
        if _is_timed(node) and any(isinstance(n, Length) for shape in shapes for n in shape):
            curves.append(_Curve(_Operation(node, values), shapes))
            terms.append(Term(node.module, shapes, curves[-1]))
    _measure(curves, timer, device)
    return Cost(terms)


def _is_timed(node: Node) -> bool:
    return not node.op.is_view and (node.name in _TIMED or torch.Tag.pointwise in node.op.tags)


def _measure(curves: Iterable[_Curve], timer: Timer, device: torch.device) -> None:
    waiting: dict[Any, list[tuple[_Curve, tuple[int, ...], Shapes]]] = {}
    for curve in curves:
        for at, shapes in curve.points():
            waiting.setdefault(curve.operation().key(shapes), []).append((curve, at, shapes))
    with torch.inference_mode():
        for same in track(list(waiting.values()), "timing operations"):
            curve, _, shapes = same[0]
            ms = timer(curve.operation().prepared(shapes, device))
            for curve, at, _ in same:
                curve.ms[at] = ms


__all__ = ["Timer", "latency_table"]
