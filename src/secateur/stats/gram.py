"""Gram matrices of the inputs that each weight multiplies: what second-order pruning knows of the data.

The output of a layer is linear in its weight, so the squared output error of a changed weight is a quadratic form in the
change, and ``X X^T`` is all that it takes. Shape ``[groups, d, d]`` with ``d = in * kernel`` in the order of the flattened
canonical weight: rows ``out * g / groups`` up to ``out * (g + 1) / groups`` of the weight multiply the inputs of group ``g``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from secateur.data.batches import Batch
from secateur.errors import LayerError
from secateur.layers import CONVOLUTIONS, Layer, is_conv1d
from secateur.memory import total_memory
from secateur.stats.inputs import attention_features
from secateur.stats.parallel import active, agree, summed
from secateur.stats.reads import Reads
from secateur.stats.watch import Call, Watcher
from secateur.types import LayerStats, Need

_CHUNK_BYTES = 32 << 20  # of input rows multiplied at once, in float32; what is summed beyond that is summed in float64
_MOST_POSITIONS = 1 << 15  # patches that one call of a convolution contributes: its positions are sampled beyond that
_PENDING = 8  # inputs that may still turn out to be shared with the next layers


@dataclass(frozen=True)
class Rows:
    """The input of one call: chunks of ``[groups, n, d]``, and what tells whether two layers have the same input."""

    tensor: Tensor  #: by whose identity inputs are compared
    kind: Hashable  #: how rows are read from it
    chunks: Callable[[], Iterator[Tensor]]
    scale: float = 1.0  #: how many rows each one stands for, where positions are sampled


Reader = Callable[[Call], Rows | None]


class _Pending:
    """The product of one input, while further layers may be found to have the same one."""

    def __init__(self, rows: Rows, layer: str, product: Tensor):
        self._tensor, self._version, self._kind = weakref.ref(rows.tensor), rows.tensor._version, rows.kind
        self.layers, self.product = {layer}, product

    def same(self, rows: Rows) -> bool:
        """Whether `rows` are of the tensor that this product was made of, unchanged since."""
        return self._tensor() is rows.tensor and self._version == rows.tensor._version and self._kind == rows.kind


class Grams(Watcher[Rows]):
    """Accumulates the Gram matrices of `layers` over the forward passes made inside `recording`, in float64.

    Layers that are given the same tensor (query, key and value; gate and up) share one matrix, which is computed once. A
    layer's matrix is the sum over all its inputs, whichever layers it shared each of them with.

    Raises LayerError, naming the layer, for a weight whose inputs cannot be read and for one whose matrix would not fit in
    memory.
    """

    unreadable = "have no Gram matrix here: leave the layer out with ignore=, or take a criterion and a solver that need none"

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], reads: Reads | None = None):
        super().__init__(model, layers, reads)
        for layer in layers.values():
            _check_memory(layer)
        self._sums: dict[frozenset[str], Tensor] = {}
        self._pending: list[_Pending] = []
        self._finite = True

    def reader(self, module: nn.Module, local: str) -> Reader | None:
        """How the inputs of the parameter `local` of `module` are read; None where they cannot be."""
        return _reader(module, local)

    def attention_output(self, call: Call) -> Rows:
        """How a call of an attention shows the inputs of its output projection."""
        return _features(call, attention_features(call))

    @contextmanager
    def recording(self, batch: Batch) -> Iterator[None]:
        """Hooks on for one forward pass of `batch`; off afterwards, whatever happens."""
        try:
            with super().recording(batch):
                yield
            self._flush(0)
        finally:
            self._pending.clear()

    @torch.no_grad()
    def add(self, layer: str, read: Rows) -> None:
        """Multiply the rows of one call, unless another layer had the same ones."""
        for pending in self._pending:
            if pending.same(read) and layer not in pending.layers:
                pending.layers.add(layer)
                return
        self._pending.append(_Pending(read, layer, _product(read)))
        self._flush(_PENDING)

    def _flush(self, leave: int) -> None:
        while len(self._pending) > leave:
            pending = self._pending.pop(0)
            key = frozenset(pending.layers)
            self._finite &= bool(torch.isfinite(pending.product.sum()))
            if key in self._sums:
                self._sums[key] += pending.product
            else:
                self._sums[key] = pending.product

    def finite(self) -> bool:
        """Whether every product so far is finite."""
        return self._finite

    @property
    def seen(self) -> set[str]:
        """Layers that were called."""
        return {name for key in self._sums for name in key}

    def take(self) -> dict[str, Tensor]:
        """The matrices by layer, float32; layers of the same inputs get one. The sums go.

        Under torch.distributed they are summed over all processes, each of which must have called every layer. Where they saw
        different layers share their inputs, each layer is summed by itself.
        """
        of = {name: frozenset(key for key in self._sums if name in key) for name in sorted(self.seen)}
        shape = {"|".join(sorted(map(str, map(sorted, keys)))): keys for keys in set(of.values())}
        totals = {
            text: torch.stack([self._sums[k] for k in sorted(keys, key=sorted)]).sum(0) for text, keys in sorted(shape.items())
        }
        self._sums.clear()
        text_of = {name: next(t for t, keys in shape.items() if keys == of[name]) for name in of}
        if active():
            if not agree(str(sorted(text_of.items())), next(iter(totals.values())).device):
                totals = {name: totals[text].clone() for name, text in text_of.items()}
                text_of = {name: name for name in text_of}
            summed(totals)
        made = {text: total.float() for text, total in totals.items()}
        return {name: made[text] for name, text in text_of.items()}


def _product(rows: Rows) -> Tensor:
    """Sum of ``x x^T`` over all rows, float64."""
    total: Tensor | None = None
    for chunk in rows.chunks():
        chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
        part = (chunk.transpose(1, 2) @ chunk).double()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total if rows.scale == 1.0 else total.mul_(rows.scale)


def with_norms(stats: LayerStats) -> LayerStats:
    """`stats` with the norms of the inputs, which are the roots of its Gram matrix's diagonal."""
    norms = stats.need(Need.GRAM).diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    shape = stats.weight.shape
    return replace(stats, input_norm=norms.repeat_interleave(shape[0] // len(norms), 0).reshape(shape))


def input_rows(call: Call) -> Iterator[Tensor]:
    """Chunks ``[groups, n, d]`` of the inputs that the weight of a linear layer or convolution multiplies in `call`.

    Padding is left out, and positions are sampled evenly where there are very many.
    """
    reader = _reader(call.module, "weight")
    assert reader is not None
    rows = reader(call)
    assert rows is not None
    return rows.chunks()


def output_rows(call: Call, output: Tensor) -> Tensor:
    """``[groups, n, out / groups]``: of a tensor in the shape of the output the rows that belong to `input_rows`."""
    if not isinstance(call.module, CONVOLUTIONS):
        return call.rows(output)[None]
    batch = output if output.dim() == call.module.weight.dim() else output[None]
    by_group = batch.transpose(0, 1).reshape(call.module.groups, -1, batch[:, 0].numel())
    return by_group[:, :, :: _every(by_group.shape[2])].transpose(1, 2)


def _every(positions: int) -> int:
    """Of how many positions of a convolution one is taken."""
    return -(-positions // _MOST_POSITIONS)


def _check_memory(layer: Layer) -> None:
    """Refuse a matrix that the machine cannot hold; CUDA reports its own shortage."""
    groups = int(getattr(layer.module, "groups", 1))
    width = math.prod(layer.shape[1:])
    needed = groups * width * width * 8 * 2
    if layer.parameter.is_cuda:
        return
    present = total_memory()
    if needed > present:
        raise LayerError(
            f"the Gram matrix of {layer.name!r}, shape {tuple(layer.shape)}, would be {groups} x {width} x {width} and take "
            f"{needed / 1e9:.0f} GB of the {present / 1e9:.0f} GB there are: leave the layer out with ignore=, or take a "
            "solver that needs none"
        )


def _reader(module: nn.Module, local: str) -> Reader | None:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION.get(local)
    if isinstance(module, nn.RNNBase):
        return _first if local in ("weight_ih_l0", "weight_ih_l0_reverse") else None
    if isinstance(module, nn.RNNCellBase):
        return _first if local == "weight_ih" else None
    if local != "weight":
        return None
    if isinstance(module, CONVOLUTIONS):
        return _convolution
    linear = isinstance(module, nn.Linear) or is_conv1d(module)
    return _first if linear else None


def _features(call: Call, features: Tensor | PackedSequence) -> Rows:
    tensor = features.data if isinstance(features, PackedSequence) else features

    def chunks() -> Iterator[Tensor]:
        rows = call.rows(tensor)
        step = max(1, _CHUNK_BYTES // (4 * rows.shape[1]))
        yield from (chunk[None] for chunk in rows.split(step))

    return Rows(tensor, "features", chunks)


def _first(call: Call) -> Rows:
    return _features(call, call.first())


def _attention_input(call: Call) -> Rows:
    query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
    if query is key and key is value:
        return _features(call, query)

    def chunks() -> Iterator[Tensor]:
        parts = [call.rows(tensor) for tensor in (query, key, value)]
        longest = max(len(part) for part in parts)
        yield torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])  # rows of zeros add nothing

    return Rows(query, ("attention", id(key), id(value)), chunks)


def _attention_argument(index: int, name: str) -> Reader:
    return lambda call: _features(call, call.argument(index, name))


class _Convolved(Exception):
    """Carries the arguments of a convolution out of the module that was about to compute it."""


class _Intercept(TorchFunctionMode):
    """Stops at the convolution with `weight`: what reaches it was padded as the module does that."""

    _functions = (F.conv1d, F.conv2d, F.conv3d)

    def __init__(self, weight: Tensor):
        super().__init__()
        self._weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise `_Convolved` at the convolution; everything else goes on."""
        if func in self._functions:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if given["weight"] is self._weight:
                raise _Convolved(given)
        return func(*args, **(kwargs or {}))


def _convolution(call: Call) -> Rows:
    """Every patch that the kernel meets, whatever padding the module has; sampled evenly where there are very many."""
    weight = call.module.weight
    try:
        with _Intercept(weight):
            call.module.forward(*call.args, **call.kwargs)
    except _Convolved as found:
        given = found.args[0]
    else:
        raise LayerError(
            f"a {type(call.module).__name__} transforms its weight before using it, so its inputs have no Gram matrix: "
            "leave it out with ignore=, or take a criterion and a solver that need none"
        )
    windows = _windows(given["input"], weight.shape[2:], given)
    positions = math.prod(windows.shape[:1] + windows.shape[2 : 2 + weight.dim() - 2])
    every = _every(positions)
    groups = given.get("groups", 1)

    def chunks() -> Iterator[Tensor]:
        return _patches(windows, groups, every)

    kind = ("patches", tuple(weight.shape[2:]), *(str(given.get(k)) for k in ("stride", "padding", "dilation", "groups")))
    return Rows(call.first(), kind, chunks, positions / len(range(0, positions, every)))


def _windows(x: Tensor, kernel: torch.Size, given: Mapping[str, Any]) -> Tensor:
    """A view ``[n, channels, *out, *kernel]`` of the padded input: every position of the kernel on it."""
    dims = len(kernel)
    x = x.detach() if x.dim() == dims + 2 else x.detach()[None]
    stride, dilation = (_each(given.get(k, 1), dims) for k in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in (_each(0 if padding == "valid" else padding, dims))]
    x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    size = [(s - d * (k - 1) - 1) // t + 1 for s, k, d, t in zip(x.shape[2:], kernel, dilation, stride, strict=True)]
    steps = x.stride()
    moves = [step * t for step, t in zip(steps[2:], stride, strict=True)]
    within = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    return x.as_strided((*x.shape[:2], *size, *kernel), (*steps[:2], *moves, *within), x.storage_offset())


def _patches(windows: Tensor, groups: int, every: int) -> Iterator[Tensor]:
    """Chunks ``[groups, positions, channels / groups * kernel]`` of every `every`-th position."""
    dims = (windows.dim() - 2) // 2
    n, channels = windows.shape[:2]
    kernel = math.prod(windows.shape[2 + dims :])
    out = math.prod(windows.shape[2 : 2 + dims])
    order = [1, 0, *range(2, 2 + dims), *range(2 + dims, windows.dim())]
    samples = max(1, _CHUNK_BYTES // (4 * out * channels * kernel))
    for start in range(0, n, samples):
        part = windows[start : start + samples].permute(order)  # [channels, n, *out, *kernel]
        flat = part.reshape(groups, channels // groups, -1, kernel)
        first = -(start * out) % every
        flat = flat[:, :, first::every]
        yield flat.transpose(1, 2).reshape(groups, flat.shape[2], -1)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] * dims if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


_ATTENTION: dict[str, Reader] = {
    "in_proj_weight": _attention_input,
    "q_proj_weight": _attention_argument(0, "query"),
    "k_proj_weight": _attention_argument(1, "key"),
    "v_proj_weight": _attention_argument(2, "value"),
}
