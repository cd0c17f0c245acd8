"""Couple: run the rules over a recording, draw the conclusions, and find the groups of units that can be removed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import secateur.graph.rules.attention
import secateur.graph.rules.elementwise
import secateur.graph.rules.indexing
import secateur.graph.rules.layers
import secateur.graph.rules.norms
import secateur.graph.rules.shape  # noqa: F401
from secateur.graph.equations import Equation
from secateur.graph.labels import Array, Dim, Labels
from secateur.graph.rules import RULES
from secateur.graph.sizes import CREATED, RESHAPES, Call, Size
from secateur.graph.trace import Node, Recording, Value

log = logging.getLogger("secateur")


class Coupler:
    """What rules see: labels of values, and the ways to tie, freeze and mark them."""

    def __init__(self, recording: Recording, *, cut_outputs: bool = False):
        self.recording, self.cut_outputs = recording, cut_outputs
        self.labels = Labels()
        self.marks: list[tuple[Array, str]] = []  #: labels known to be heads or head dimensions
        self.equations: list[Equation] = []
        self.numbers: dict[Value, Tensor] = {}  #: tensors that the forward wrote down
        self.unknown: dict[str, set[str]] = {}  #: operations without a rule, and the modules they are in
        self._written = {id(call) for call in recording.sizes.calls}
        self._weights = set(recording.values.values())
        self._given = {v for v in recording.values.values() if v.buffer}

    def run(self) -> None:
        """Apply the rules to all operations, then freeze outputs, unless they may be cut, and whatever sizes cannot follow."""
        for node in self.recording.nodes:
            self._apply(node)
        for value in () if self.cut_outputs else self.recording.outputs:
            for own in self.labels_of(value):
                self.labels.freeze(own, "it is an output of the model")
        for call in self.recording.sizes.calls:
            self._equate(call)
        self.equations += [Equation(*guard) for guard in self.recording.sizes.guards]
        self.labels.close()

    def _apply(self, node: Node) -> None:
        rule = RULES.get(node.name)
        if rule is None or node.op.namespace not in ("aten", "prims"):
            self.unknown.setdefault(f"{node.op.namespace}.{node.name}", set()).add(node.module)
            self.freeze_all(node, f"{node.op.namespace}.{node.name} has no rule")
            return
        out = rule(self, node)
        if out is None:
            return
        for value, labels in zip(node.outputs, out, strict=True):
            assert len(labels) == value.ndim, f"the rule of {node.op} gives {len(labels)} dimensions for {value.shape}"
            value.labels = [None if n <= 1 else own for own, n in zip(labels, value.shape, strict=True)]
        tensors = node.tensors
        if tensors and all(self.is_weight(t) or t.constant is not None for t in tensors):
            self._weights.update(node.outputs)
            if all(t in self._given or t.constant is not None for t in tensors):
                self._given.update(node.outputs)

    def labels_of(self, value: Value, known: Mapping[int, Dim] | None = None) -> list[Dim]:
        """Labels of all dimensions; those of a parameter or buffer are made when it is first used, but for `known` ones."""
        if value.labels is None:
            if value.name is not None:
                given = known or {}
                value.labels = [
                    given[d] if d in given else self.labels.fresh(n) if n > 1 else None for d, n in enumerate(value.shape)
                ]
            else:
                value.labels = [None] * value.ndim
        return value.labels

    def adopt(self, value: Value, d: int, dim: Dim) -> None:
        """Give dimension `d` of a parameter that nothing has used yet the labels `dim`, to which it would be tied."""
        if value.labels is None and value.name is not None and dim is not None:
            self.labels_of(value, {d: dim})

    def is_weight(self, value: Value) -> bool:
        """Whether a value depends on parameters and buffers alone."""
        return value in self._weights

    def tie(self, a: Dim, b: Dim, node: Node, reason: str) -> Dim:
        """Two dimensions of one size, index by index."""
        if a is None and b is None:
            return None
        frozen = a is None or b is None  # only then is there something to say
        return self.labels.tie(a, b, _at(node, reason or "it meets a dimension that cannot be cut") if frozen else "")

    def freeze(self, dim: Dim, node: Node, reason: str) -> None:
        """Nothing of `dim` may be removed."""
        if dim is not None:
            self.labels.freeze(dim, _at(node, reason))

    def freeze_all(self, node: Node, reason: str = "no part of this operation can be cut") -> None:
        """Freeze everything that touches `node`."""
        for value in node.tensors:
            for dim in self.labels_of(value):
                self.freeze(dim, node, reason)
        for value in node.outputs:
            value.labels = [None] * value.ndim

    def contract(self, x: Value, a: Dim, b: Dim, node: Node, *, activations: bool = False) -> None:
        """A sum over a dimension that `x` shares with another tensor; of both its labels are given."""
        self.tie(a, b, node, "it is summed against a dimension that cannot be cut")
        if activations:
            self.mark(a, "head_dim")
        if x in self._given:
            self.freeze(a, node, "it is data that the model was given")

    def mark(self, dim: Dim, kind: str) -> None:
        """Remember what kind of thing these labels are."""
        if dim is not None:
            self.marks.append((dim, kind))

    def mixed(self, dim: Dim, node: Node) -> None:
        """A statistic is taken over `dim`: after a cut, over what is kept of it."""

    def sized(self, node: Node, d: int, n: int) -> Dim:
        """Labels for a dimension whose size alone matters and whose values are all the same."""
        return self.labels.fresh(n) if n > 1 else None

    def written(self, node: Node) -> bool:
        """Whether the sizes of this operation were written in Python, where equations will be made of them."""
        return node.call is not None and id(node.call) in self._written and node.call.name in _WRITES

    def ends(self, node: Node, dim: Array, start: int, stop: int) -> None:
        """A range with fixed ends is taken: what lies before its ends stays."""
        before = stop if stop < len(dim) else start
        self.freeze(dim[:before], node, f"the range {start}:{stop} of it is taken")

    def bind_groups(self, node: Node, group: Dim, groups: int) -> None:
        """The number of groups that a convolution or normalisation is told equals the number kept of `group`."""
        if group is None:
            return
        call: Call | None = node.call
        told = None
        if call is not None and id(call) in self._written:
            told = call.argument(1, "num_groups") if call.name == "group_norm" else call.argument(_GROUPS_AT, "groups")
        if told is None:
            self.freeze(group, node, "the number of groups cannot follow")
        else:
            self.equations.append(Equation(("count", group), self.recording.sizes.expr(told), node.module))

    def _equate(self, call: Call) -> None:
        """Turn the sizes of one Python-level call into equations."""
        sizes = self.recording.sizes
        handled: list[Any] = []

        def equal(value: Value, d: int, size: Any, argument: int = 0, free: bool = False) -> None:
            handled.append(size)
            own = self.labels_of(value)[d]
            if own is not None:
                self.equations.append(Equation(("count", own), sizes.expr(size), call.module, call.frames, argument, free))

        out = call.output
        if call.name in _NEW_SHAPE and isinstance(out, Value):
            first = 0 if call.name in ("zeros", "ones", "empty", "full") else 1
            shape: Any = call.args[first:] or (call.kwargs.get("size", call.kwargs.get("shape", ())),)
            shape = shape[0] if isinstance(shape[0], (tuple, list)) else shape
            shape = shape[: out.ndim]
            free = call.name in RESHAPES and -1 not in shape
            for d, size in enumerate(shape):
                if isinstance(size, int) and size != -1:
                    equal(out, d, size, d, free)
        elif call.name == "repeat" and isinstance(out, Value):
            counts = call.args[1:] if isinstance(call.args[1], int) else call.args[1]
            x = call.args[0]
            for d, size in enumerate(counts):
                handled.append(size)
                own, source = self.labels_of(out)[d], d - out.ndim + x.ndim
                if own is not None:
                    times = ("*", sizes.expr(size), ("dim", x, source)) if source >= 0 else sizes.expr(size)
                    self.equations.append(Equation(("count", own), times, call.module))
        elif call.name == "unflatten" and isinstance(out, Value):
            dim, parts = call.argument(1, "dim"), call.argument(2, "sizes")
            for d, size in enumerate(parts):
                if size != -1:
                    equal(out, int(dim) % (out.ndim - len(parts) + 1) + d, size, d, -1 not in parts)
        elif call.name in ("split", "split_with_sizes"):
            told, dim = call.argument(1, "split_size_or_sections", call.kwargs.get("split_size")), call.argument(2, "dim", 0)
            if told is None:
                told = call.kwargs.get("split_sizes")
            parts = told if isinstance(told, (tuple, list)) else [told] * len(out)
            for value, size in zip(out, parts, strict=True):
                equal(value, int(dim) % value.ndim, size)
        elif call.name in ("layer_norm", "rms_norm"):
            shape = call.argument(1, "normalized_shape")
            for d, size in enumerate(shape):
                equal(call.args[0], call.args[0].ndim - len(shape) + d, size)
        elif call.name == "narrow":
            x, dim, start, length = (call.argument(i, k) for i, k in enumerate(("input", "dim", "start", "length")))
            equal(out, int(dim) % out.ndim, length)
            self._prefix(x, int(dim) % x.ndim, start, call, handled)
        elif call.name == "__getitem__":
            self._getitem(call, handled)
        elif call.name == "group_norm":
            handled.append(call.argument(1, "num_groups"))
        elif call.name.startswith("conv"):
            handled.append(call.argument(_GROUPS_AT, "groups"))
        known = {id(h) for h in handled}
        for leaf in _sizes_in((call.args, call.kwargs)):
            if id(leaf) not in known and sizes.expr(leaf)[0] != "const":
                self.equations.append(Equation(sizes.expr(leaf), ("const", int.__int__(leaf)), call.module))

    def _getitem(self, call: Call, handled: list[Any]) -> None:
        x, index = call.args[0], call.args[1]
        if not isinstance(x, Value):
            return
        index = index if isinstance(index, tuple) else (index,)
        taken = sum(1 for i in index if i is not None and i is not Ellipsis)
        d = 0
        for i in index:
            if i is None:
                continue
            if i is Ellipsis:
                d += x.ndim - taken
                continue
            if isinstance(i, slice) and self.labels_of(x)[d] is not None and i.step in (None, 1):
                for end in (i.start, i.stop):
                    if end is not None:
                        self._prefix(x, d, end, call, handled)
            d += 1

    def _prefix(self, x: Value, d: int, end: Any, call: Call, handled: list[Any]) -> None:
        """The range of a slice begins or ends at `end`: as many as that are kept before it."""
        handled.append(end)
        own = self.labels_of(x)[d]
        n = x.shape[d]
        position = int.__int__(end)
        if own is None or position == 0:
            return
        expr = self.recording.sizes.expr(end)
        if position < 0:
            self.equations.append(Equation(("count", own[max(position, -n) :]), ("-", ("const", 0), expr), call.module))
        elif position < n:
            self.equations.append(Equation(("count", own[:position]), expr, call.module))
        elif position == n and expr[0] != "const":
            self.equations.append(Equation(("count", own), expr, call.module))


_NEW_SHAPE = CREATED | {"view", "reshape", "expand", "broadcast_to"}
_GROUPS_AT = 6
_WRITES = frozenset(["split", "split_with_sizes", "narrow", "__getitem__"])


def _at(node: Node, reason: str) -> str:
    return f"{reason} ({node.name} in {node.module or 'the model itself'})"


def _sizes_in(x: Any) -> list[Size]:
    if isinstance(x, slice):
        x = (x.start, x.stop, x.step)
    elif isinstance(x, dict):
        x = tuple(x.values())
    found = []
    for y in x:
        if type(y) is Size:
            found.append(y)
        elif isinstance(y, (tuple, list, dict, slice)):
            found += _sizes_in(y)
    return found
