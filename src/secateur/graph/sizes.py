"""Where the sizes in a forward come from, so that they can follow a cut.

A forward writes ``x.view(b, n, self.heads, self.head_dim)``. When heads are cut, the attribute `heads` has to become
smaller, and a size that was written down as a number cannot. While the forward is recorded, the integer attributes of all
modules, and all shapes, are replaced by integers that remember how they were computed. What they are used for becomes
equations between the number of kept indices of a dimension and an expression of attributes and shapes.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.graph.rewrite import Frames, frames_from

if TYPE_CHECKING:
    from secateur.graph.trace import Recorder

#: ("const", n), ("attr", name), ("dim", value, d) or (operator, left, right).
Expr = tuple[Any, ...]

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
#: How sizes are compared.
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Size(int):
    """An integer that remembers the expression it came from."""

    expr: Expr  #: how it came about
    owner: Sizes  #: the run it belongs to

    def __new__(cls, value: int, expr: Expr, owner: Sizes) -> Size:
        """The integer `value` that came about as `expr` in the run of `owner`."""
        self = super().__new__(cls, value)
        self.expr, self.owner = expr, owner
        return self

    def _binary(self, symbol: str, left: Any, right: Any) -> Any:
        if isinstance(left, bool) or isinstance(right, bool) or not (isinstance(left, int) and isinstance(right, int)):
            self.owner.leak(self)
            return NotImplemented
        value = OPERATORS[symbol](int.__int__(left), int.__int__(right))
        return Size(value, (symbol, self.owner.expr(left), self.owner.expr(right)), self.owner)

    def __add__(self, other: Any) -> Any:
        return self._binary("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._binary("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return self._binary("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._binary("-", other, self)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (list, tuple, str)):
            return NotImplemented
        return self._binary("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.__mul__(other)

    def __floordiv__(self, other: Any) -> Any:
        return self._binary("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._binary("//", other, self)

    def __mod__(self, other: Any) -> Any:
        return self._binary("%", self, other)

    def __rmod__(self, other: Any) -> Any:
        return self._binary("%", other, self)

    def __neg__(self) -> Any:
        return self._binary("-", 0, self)

    def __float__(self) -> float:
        self.owner.leak(self)
        return float(int.__int__(self))

    def __truediv__(self, other: Any) -> Any:
        self.owner.leak(self)
        return int.__int__(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.owner.leak(self, 1)
        return other / int.__int__(self)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        self.owner.leak(self)
        return pow(int.__int__(self), other, modulus)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        self.owner.leak(self, 1)
        return pow(other, int.__int__(self), modulus)

    def _compare(self, other: Any, symbol: str) -> Any:
        result = COMPARISONS[symbol](int.__int__(self), int.__int__(other) if isinstance(other, Size) else other)
        if isinstance(other, int):
            equal = symbol == ("==" if result else "!=")
            if equal:
                self.owner.guard(self, other)
            else:
                self.owner.condition(self, symbol, other, result)
        return result

    def __eq__(self, other: object) -> bool:
        return self._compare(other, "==")

    def __ne__(self, other: object) -> bool:
        return self._compare(other, "!=")

    def __lt__(self, other: Any) -> bool:
        return self._compare(other, "<")

    def __le__(self, other: Any) -> bool:
        return self._compare(other, "<=")

    def __gt__(self, other: Any) -> bool:
        return self._compare(other, ">")

    def __ge__(self, other: Any) -> bool:
        return self._compare(other, ">=")

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> Any:
        return int, (int.__int__(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int.__int__(self)

    def __repr__(self) -> str:
        return int.__repr__(self)


@dataclass(eq=False, slots=True)
class Call:
    """One call of a torch function from Python: what it was given and what it gave."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    module: str
    frames: Frames = ()  #: where it was called, of reshapes

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """The argument at `position`, or of that name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(keyword, default)


class Sizes(TorchFunctionMode):
    """Function mode that hands out remembered sizes and keeps the calls they are used in."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder
        self.current: Call | None = None
        self.calls: list[Call] = []
        self.guards: list[
            tuple[Expr, Expr, str, Frames, int]
        ] = []  #: expressions that must stay equal, and the module that compared
        self.conditions: dict[tuple[Any, ...], None] = {}  #: ``(left, symbol, right, result, module)`` on which paths depended
        self.old: dict[str, int] = {}  #: the attributes' values
        self.on = False

    def expr(self, n: Any) -> Expr:
        """How an integer came about."""
        return n.expr if isinstance(n, Size) and n.owner is self else ("const", int.__int__(n))

    def leak(self, size: Size, operand: int = 0) -> None:
        """`size` is used as a number and not as a size, as that operand of an expression: it has to stay what it is."""
        self.guard(size, int.__int__(size), frames_from(sys._getframe(2)), operand)

    def guard(self, size: Size, other: Any, frames: Frames = (), operand: int = 0) -> None:
        """The forward depends on `size` being equal to `other`."""
        if self.on and size.owner is self:
            stack = self.recorder.stack
            self.guards.append((size.expr, self.expr(other), stack[-1] if stack else "", frames, operand))

    def condition(self, size: Size, symbol: str, other: Any, result: bool) -> None:
        """The forward took the path it took because this comparison gave `result`."""
        if self.on and size.owner is self:
            stack = self.recorder.stack
            self.conditions[size.expr, symbol, self.expr(other), result, stack[-1] if stack else ""] = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.recorder.meta and "device" in kwargs and str(kwargs["device"]) == "meta":  # as its own tensors told it
            kwargs = {**kwargs, "device": self.recorder.device}
        if name == "__get__":
            out = func(*args, **kwargs)
            return self._shape(args[0], out) if func.__self__ is Tensor.shape else out
        if func is Tensor.size and len(args) == 1 and not kwargs:
            return self._shape(args[0], func(args[0]))
        if func is Tensor.size:
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._shape(args[0], args[0].size())[dim]
        if func in (Tensor.numel, Tensor.nelement):
            return self._product(args[0], func(args[0]))
        if func is F.scaled_dot_product_attention and self.recorder.meta:
            return self.recorder.attention(*args, **kwargs)
        call = Call(name, args, kwargs, None, self.recorder.stack[-1] if self.recorder.stack else "")
        before, self.current = self.current, call
        try:
            out = func(*args, **kwargs)
        finally:
            self.current = before
        if name in _SIZED or _has_size(args) or _has_size(kwargs.values()):
            call.output = self.recorder.values(out)
            call.args, call.kwargs = self.recorder.values(args), self.recorder.values(kwargs)
            if name in RESHAPES:
                call.frames = frames_from(sys._getframe(1))
            self.calls.append(call)
        return out

    def _shape(self, tensor: Tensor, shape: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return shape
        value = self.recorder.value(tensor)
        return torch.Size([Size(n, ("dim", value, d), self) for d, n in enumerate(shape)])

    def _product(self, tensor: Tensor, n: int) -> Size:
        value = self.recorder.value(tensor)
        dims: list[Expr] = [("dim", value, d) for d in range(value.ndim)] or [("const", n)]
        return Size(n, functools.reduce(lambda a, b: ("*", a, b), dims), self)

    @contextlib.contextmanager
    def tracking(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Replace integer attributes of modules, given by name, by remembered ones, inside."""
        names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        originals = {n: getattr(F, n) for n in names}
        undo: list[tuple[dict[str, Any], str, Any]] = []
        seen: set[int] = set()
        for path, module in modules.items():
            self._tag(vars(module), path, undo)
            for key in ("config", "cfg"):
                config = vars(module).get(key)
                if config is not None and hasattr(config, "__dict__") and id(config) not in seen:
                    seen.add(id(config))
                    self._tag(vars(config), f"{path}.{key}" if path else key, undo)
        try:
            # so that functions written in Python show the calls they consist of
            for n in names:
                setattr(F, n, lambda *_: False)
            self.on = True
            with self:
                yield
        finally:
            self.on = False
            for n, original in originals.items():
                setattr(F, n, original)
            for target, key, value in undo:
                target[key] = value

    def _tag(self, attributes: dict[str, Any], path: str, undo: list[tuple[dict[str, Any], str, Any]]) -> None:
        prefix = f"{path}." if path else ""
        for key, value in list(attributes.items()):
            if type(value) is int:
                new: Any = self._attribute(f"{prefix}{key}", value)
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                new = type(value)(self._attribute(f"{prefix}{key}[{i}]", v) for i, v in enumerate(value))
            else:
                continue
            undo.append((attributes, key, value))
            attributes[key] = new

    def _attribute(self, name: str, value: int) -> Size:
        self.old[name] = value
        return Size(value, ("attr", name), self)


#: Calls in which one size follows from the others.
RESHAPES = frozenset(["view", "reshape", "unflatten"])
#: Calls that make a tensor of a shape that they are given.
CREATED = frozenset(["zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full"])
_SIZED = CREATED | frozenset(
    [
        "view",
        "reshape",
        "expand",
        "unflatten",
        "split",
        "split_with_sizes",
        "narrow",
        "__getitem__",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ]
)


def _has_size(items: Any) -> bool:
    for item in items:
        if isinstance(item, Size):
            return True
        if isinstance(item, (tuple, list)) and _has_size(item):
            return True
        if isinstance(item, slice) and any(isinstance(x, Size) for x in (item.start, item.stop, item.step)):
            return True
    return False
