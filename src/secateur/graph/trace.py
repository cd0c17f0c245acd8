"""Run a model's forward once on fake tensors and record every ATen operation, without computing anything."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import ModelError
from secateur.graph.heads import explicit_heads
from secateur.graph.labels import Dim
from secateur.graph.shapes import IN_PLACE, SHAPES, Like, contiguous
from secateur.graph.sizes import Sizes

log = logging.getLogger("secateur")
_META = torch.device("meta")


@dataclass(eq=False, slots=True, repr=False)
class Value:
    """One tensor of the recorded run. `labels` are filled in by the rules: one entry for each dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None  #: the parameter or buffer it is
    constant: Tensor | None = None  #: itself, where it is neither input nor parameter nor computed by a recorded operation
    buffer: bool = False
    labels: list[Dim] | None = None

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(eq=False, slots=True, repr=False)
class Node:
    """One recorded operation. `args` and `kwargs` hold a `Value` wherever the call had a tensor."""

    op: Any
    name: str  #: of the operation without overload and without the underscore of in-place ones: ``add_.Tensor`` -> ``add``
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Value]  #: all that it was given
    outputs: list[Value]
    module: str
    call: Any = None  #: the Python-level call (`sizes.Call`) inside which it happened


@dataclass
class ModuleCall:
    """One call of a module: the tensors that went in and out, and the operations between."""

    module: str
    inputs: list[Value]
    outputs: list[Value]
    first: int
    last: int


@dataclass
class Recording:
    """What one forward pass did."""

    nodes: list[Node]
    inputs: list[Value]
    outputs: list[Value]
    values: dict[str, Value]  #: parameters and buffers that were used, by name
    calls: list[ModuleCall]
    sizes: Sizes
    fake: bool
    replaced: bool = False  #: whether modules ran in another form (`heads.explicit_heads`)
    notes: list[str] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Dispatch mode that writes down operations. Tensors carry their `Value` as an attribute."""

    def __init__(self, device: torch.device, *, meta: bool) -> None:
        super().__init__()
        self.device, self.meta = device, meta
        self._known: dict[Any, Any] = {}
        self.paused = False
        self._real = False  #: whether the arguments last looked at had tensors with values
        self.nodes: list[Node] = []
        self.named: dict[str, Value] = {}
        self.stack: list[str] = []
        self.sizes = Sizes(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while recording, and the wrapper takes as long as the rest of an operation

    def value(self, tensor: Tensor) -> Value:
        """The value that stands for `tensor`; one that nobody made in this run is a constant."""
        found = getattr(tensor, "_secateur_value", None)
        if found is None or found[0] is not self:
            if self.meta and tensor.is_meta:
                raise ModelError("a tensor without values came from nowhere")
            made = Value(tuple(tensor.shape), tensor.dtype, constant=tensor)
            self.tag(tensor, made)
            return made
        return found[1]

    def tag(self, tensor: Tensor, value: Value) -> None:
        """Let `tensor` stand for `value` from now on."""
        tensor._secateur_value = (self, value)  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or func.namespace == "prim":  # questions about a tensor, not operations on it
            return func(*args, **kwargs)
        tensors: list[Value] = []
        self._real = False
        seen_args, seen_kwargs = self.values(args, tensors), self.values(kwargs, tensors)
        if self.meta:
            if self._real:
                args, kwargs = _on_meta(args), _on_meta(kwargs)
            if kwargs.get("device") is not None:
                if kwargs["device"].type == "meta":
                    seen_kwargs["device"] = self.device
                kwargs = {**kwargs, "device": _META}
            if func is torch.ops.aten._local_scalar_dense.default:
                out = _Evaluated(self.nodes).scalar(seen_args[0])
            else:
                out = self._inferred(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        outputs: list[Value] = []
        for given in out if isinstance(out, (tuple, list)) else (out,):
            for tensor in given if isinstance(given, list) else (given,):
                if isinstance(tensor, Tensor):
                    value = Value(tuple(tensor.shape), tensor.dtype)
                    self.tag(tensor, value)
                    outputs.append(value)
        self._write(func, seen_args, seen_kwargs, tensors, outputs)
        return out

    def _write(self, op: Any, args: Any, kwargs: Any, tensors: list[Value], outputs: list[Value]) -> None:
        module = self.stack[-1] if self.stack else ""
        self.nodes.append(Node(op, _name(op), args, kwargs, tensors, outputs, module, self.sizes.current))

    def _inferred(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` gives on the meta device. Networks do the same again and again, so shapes are worked out once."""
        if func.overloadpacket.__name__ in IN_PLACE:
            return args[0]
        ours = SHAPES.get(func)
        known = ours(*args, **kwargs) if ours is not None else None
        if known is not None:
            return _made(known)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())))
            known = self._known.get(key)
        except TypeError:  # something that cannot be hashed
            return func(*args, **kwargs)
        if known is not None:
            return _made(known)
        out = func(*args, **kwargs)
        tensors = out if isinstance(out, tuple) else (out,)
        given = {id(x) for x in args}
        if all(isinstance(t, Tensor) and id(t) not in given for t in tensors) and not isinstance(out, list):
            self._known[key] = [(t.shape, t.stride(), t.dtype) for t in tensors]
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention as one operation: on the meta device it would fall apart into products that hide its scale."""
        tensors: list[Value] = []
        seen_args, seen_kwargs = self.values((q, k, v, *args), tensors), self.values(kwargs, tensors)
        self.paused = True
        out = _made([contiguous((*q.shape[:-3], q.shape[-2], *q.shape[-3:-2], v.shape[-1]), q.dtype)])
        out = out.transpose(-3, -2) if q.dim() > 3 else out  # as the kernels lay it out
        self.paused = False
        value = Value(tuple(out.shape), out.dtype)
        self.tag(out, value)
        self._write(torch.ops.aten.scaled_dot_product_attention.default, seen_args, seen_kwargs, tensors, [value])
        return out

    def values(self, x: Any, tensors: list[Value] | None = None) -> Any:
        """Arguments with a `Value` for every tensor; these are added to `tensors` as well."""
        kind = type(x)
        if kind in _PLAIN:
            return x
        if isinstance(x, Tensor):
            value = self.value(x)
            if tensors is not None:
                tensors.append(value)
            self._real |= not x.is_meta
            return value
        if isinstance(x, (tuple, list)):
            seen = [y if type(y) in _PLAIN else self.values(y, tensors) for y in x]
            return seen if kind is list else tuple(seen)
        if isinstance(x, dict):
            return {k: self.values(v, tensors) for k, v in x.items()}
        return x


#: What arguments mostly are, beside tensors.
_PLAIN = frozenset({int, float, bool, type(None), str, torch.dtype, torch.device})


@functools.cache
def _name(op: Any) -> str:
    packet: str = op._overloadpacket.__name__
    return packet.rstrip("_") if not packet.startswith("__") else packet


class _Evaluated:
    """Values that follow from numbers in the forward alone, such as positions: recorded operations, done after all."""

    def __init__(self, nodes: list[Node]):
        self.made = {value: node for node in nodes for value in node.outputs}
        self.known: dict[Value, Tensor] = {}

    def scalar(self, value: Value) -> Any:
        """The one number that `value` holds. Raises ModelError where it depends on what the model is given or has."""
        with torch.utils._python_dispatch._disable_current_modes():
            return self.tensor(value).item()

    def tensor(self, value: Value) -> Tensor:
        """The tensor that `value` stands for."""
        if value.constant is not None:
            return value.constant
        if value not in self.known:
            node = self.made.get(value)
            if node is None:
                raise ModelError("the forward asks for a number that depends on its input")
            args, kwargs = pytree.tree_map_only(Value, self.tensor, (node.args, node.kwargs))
            outputs = [t for t in pytree.tree_leaves(node.op(*args, **kwargs)) if isinstance(t, Tensor)]
            self.known.update(zip(node.outputs, outputs, strict=True))
        return self.known[value]


def record(model: nn.Module, example: Any) -> Recording:
    """Record one forward pass of `model` on `example`: a tensor, a tuple of positional or a mapping of keyword arguments.

    Runs on tensors without values, so nothing is computed and a model on the meta device will do: first on those of the meta
    device, then, where the forward mixes devices or asks which it is on, on torch's fake tensors. A forward that needs values
    (``.item()``, data-dependent shapes) is run on real tensors instead, and the recording's notes say so. Raises ModelError
    where the forward itself fails. The model is left exactly as it was.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in modules.values()):  # whose kernels are those of a device
        try:
            return _record(model, modules, example, "meta")
        except Exception as error:
            log.debug("tracing on fake tensors, since those of the meta device failed: %s", _short(error))
    try:
        return _record(model, modules, example, "fake")
    except Exception as error:
        if any(p.is_meta for p in model.parameters()):
            raise ModelError(f"the forward of {type(model).__name__} cannot be traced: {_short(error)}") from error
        log.info("tracing on real tensors, since fake ones failed: %s", _short(error))
        note = f"traced on real tensors, since fake ones failed: {_short(error)}"
    try:
        recording = _record(model, modules, example, "real")
    except Exception as error:
        raise ModelError(
            f"the forward of {type(model).__name__} fails on the example: {_short(error)}. "
            f"Check the example's shapes and types."
        ) from error
    recording.notes.append(note)
    return recording


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called on an example: tensor or tuple -> positional, mapping -> keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in a model's output, whatever containers it uses (mappings, sequences, dataclasses, plain objects)."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in _PLAIN:
        return []
    if isinstance(tree, (tuple, list)):
        return [t for v in tree for t in tensors_in(v)]
    if isinstance(tree, Mapping):
        return [t for v in tree.values() for t in tensors_in(v)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [t for v in vars(tree).values() for t in tensors_in(v)]
    return []


def _short(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def _record(
    model: nn.Module, modules: Mapping[str, nn.Module], example: Any, how: Literal["meta", "fake", "real"]
) -> Recording:
    args, kwargs = arguments(example)
    device = next((t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.device("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if how == "fake" else None
    recorder = Recorder(device, meta=how == "meta")

    def stand_in(tensor: Tensor) -> Tensor:
        return _bare(tensor) if how == "meta" else _faked(tensor, mode, device)

    calls: list[ModuleCall] = []
    with untouched(model), explicit_heads(modules.values()) as replaced, contextlib.ExitStack() as stack:
        _substitute(modules, recorder, stand_in)
        args, kwargs = pytree.tree_map_only(Tensor, stand_in, (args, kwargs))
        inputs = []
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                inputs.append(Value(tuple(t.shape), t.dtype))
                recorder.tag(t, inputs[-1])
        stack.enter_context(_watched(modules, recorder, calls))
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(_quiet())
            stack.enter_context(mode)
        stack.enter_context(recorder.sizes.tracking(modules))
        stack.enter_context(recorder)
        output = model(*args, **kwargs)
    tensors = tensors_in(output)
    if not tensors:
        raise ModelError(f"{type(model).__name__} returned {type(output).__name__}, in which no tensor was found")
    outputs = [recorder.value(t) for t in tensors]
    return Recording(recorder.nodes, inputs, outputs, recorder.named, calls, recorder.sizes, how != "real", replaced)


def _faked(tensor: Tensor, mode: FakeTensorMode | None, device: torch.device) -> Tensor:
    if mode is None:
        return tensor.detach().clone() if not isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), False)
    device = device if tensor.is_meta else tensor.device
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        return mode.from_tensor(tensor, static_shapes=True)
    # what from_tensor does for a plain tensor, without describing it first: ten times faster
    made = FakeTensor(mode, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META), device)
    made._is_param = isinstance(tensor, nn.Parameter)  # type: ignore[attr-defined]
    return made


def _bare(tensor: Tensor) -> Tensor:
    """A tensor of the meta device like this one."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
    return nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made


def _made(likes: list[Like]) -> Any:
    made = tuple(torch.empty_strided(shape, stride, dtype=dtype, device=_META) for shape, stride, dtype in likes)
    return made[0] if len(made) == 1 else made


def _key(x: Any) -> Any:
    kind = type(x)
    if kind is list or kind is tuple:
        return kind, *[_key(y) for y in x]
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (kind, x)


def _on_meta(x: Any) -> Any:
    """Arguments with tensors that hold values (constants of the forward) as bare ones."""
    if isinstance(x, Tensor):
        return x if x.is_meta else _bare(x)
    if type(x) in (tuple, list):
        return type(x)(_on_meta(y) for y in x)
    return {k: _on_meta(v) for k, v in x.items()} if type(x) is dict else x


def _substitute(modules: Mapping[str, nn.Module], recorder: Recorder, stand_in_for: Callable[[Tensor], Tensor]) -> None:
    """Put tagged stand-ins in the place of all parameters and buffers."""
    stand_in: dict[int, Tensor] = {}
    for path, module in modules.items():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in stand_in:
                    made = stand_in_for(tensor)
                    name = f"{path}.{key}" if path else key
                    recorder.named[name] = Value(tuple(tensor.shape), tensor.dtype, name, buffer=table is module._buffers)
                    recorder.tag(made, recorder.named[name])
                    stand_in[id(tensor)] = made
                table[key] = stand_in[id(tensor)]
        flat = module.__dict__.get("_flat_weights")
        if isinstance(flat, list):
            module.__dict__["_flat_weights"] = [stand_in.get(id(t), t) for t in flat]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the attributes, parameters, buffers and hooks it had."""
    saved = []
    for module in model.modules():
        attributes = dict(vars(module))
        saved.append((vars(module), attributes, [(v, dict(v)) for v in attributes.values() if isinstance(v, dict)]))
    try:
        if all(type(m).train is nn.Module.train and type(m).eval is nn.Module.eval for m in model.modules()):
            for own, *_ in saved:
                own["training"] = False  # what eval() does, without asking of every module what kind of attribute that is
        else:
            model.eval()
        yield
    finally:
        for own, attributes, tables in saved:
            own.clear()
            own.update(attributes)
            for table, before in tables:
                table.clear()
                table.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What fake tensors cannot do is reported by `record`, once."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _watched(modules: Mapping[str, nn.Module], recorder: Recorder, calls: list[ModuleCall]) -> Iterator[None]:
    """Know at every operation in which module it happens."""
    names = {module: name for name, module in modules.items()}
    open_calls: list[ModuleCall] = []

    def before(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        name = names.get(module, recorder.stack[-1] if recorder.stack else "")
        recorder.stack.append(name)
        inputs = [recorder.value(t) for t in tensors_in((args, kwargs or {}))]
        open_calls.append(ModuleCall(name, inputs, [], len(recorder.nodes), -1))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        recorder.stack.pop()
        call = open_calls.pop()
        call.outputs = [recorder.value(t) for t in tensors_in(output)]
        call.last = len(recorder.nodes)
        calls.append(call)

    pre = nn.modules.module.register_module_forward_pre_hook(before)
    post = nn.modules.module.register_module_forward_hook(after)
    try:
        yield
    finally:
        pre.remove()
        post.remove()
