"""Multiply-adds of one forward pass, dense and nonzero, counted on the operations that really run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secateur.data.batches import Batch, forward
from secateur.errors import ModelError
from secateur.measure.modes import evaluating
from secateur.measure.sizes import nonzeros

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-adds of one weight: `calls` operations used it, `dense` counts all its values, `nonzero` those not zero."""

    name: str
    calls: int
    dense: int
    nonzero: int


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward pass; `layers` has the share of each weight, the rest are products of activations.

    `uncounted` names operations of other libraries, whose cost nobody knows here.
    """

    dense: int
    nonzero: int
    layers: tuple[LayerMacs, ...]
    uncounted: tuple[str, ...] = ()


def macs(model: nn.Module, example: Batch) -> Macs:
    """Count the multiply-adds of one forward pass of `example`, for its entire batch.

    Convention: one MAC is one multiplication with its addition, which is two FLOPs. Matrix products, convolutions and
    attention count, at the shapes that run; what is elementwise, pooling, normalisation and embedding look-ups do not.
    Positions of padding count like others. Attention counts as dense, also where it is causal. A layer called twice
    counts twice.

    `nonzero` multiplies the MACs of each operation on a weight by the fraction of nonzero values in the very slice of the
    weight that it uses. Weights are recognised by their memory, so those that functional calls, attention projections,
    recurrent layers and autocast use are found too; a weight that is computed anew in the forward pass counts as dense.

    The model runs once, for real, in evaluation mode and without gradients; it is left as it was, without hooks.
    """
    counter = _Counter(model)
    with evaluating(model), torch.no_grad(), _plain_encoder(), counter:
        try:
            forward(model, example)
        except (RuntimeError, TypeError) as error:
            raise ModelError(f"the model does not run on the example: {error}") from error
    return counter.result()


#: Multiply-adds and the factors among which a weight may stand, for each product that one operation does.
Products = Iterable[tuple[int, Sequence[Any]]]


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Products:
    """softmax(Q K^T) V for ``[batch, heads, positions, dim]``, all pairs of positions counted."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    yield pairs * (query.shape[-1] + value.shape[-1]), ()


def _matrix_vector(matrix: Tensor, *rest: Any, **options: Any) -> Products:
    yield matrix.numel(), (matrix, *rest)


def _bilinear(left: Tensor, weight: Tensor, right: Tensor, *rest: Any, **options: Any) -> Products:
    """nn.Bilinear on ``[samples, in1]`` and ``[samples, in2]``; its weight ``[out, in1, in2]`` is used once a sample."""
    yield left.shape[0] * weight.numel(), (weight,)


def _lstm(inputs: Tensor, of_input: Tensor, of_hidden: Tensor, *rest: Any, **options: Any) -> Products:
    """One layer and direction of oneDNN's LSTM: each weight is used once a position."""
    return _recurrent(inputs, (of_input, of_hidden))


def _recurrent(inputs: Tensor, weights: Sequence[Tensor], *rest: Any, **options: Any) -> Products:
    """cuDNN's recurrent layers: matrices are used once a position, vectors are biases."""
    positions = inputs.shape[:-1].numel()
    for weight in weights:
        if weight.dim() == 2:
            yield positions * weight.numel(), (weight,)


#: What torch's registry lacks, or counts differently for grouped queries.
_FORMULAS: dict[Any, Callable[..., Products]] = {
    aten.mv: _matrix_vector,
    aten.addmv: lambda bias, *factors, **options: _matrix_vector(*factors),
    aten.dot: _matrix_vector,
    aten._trilinear: _bilinear,
    aten.mkldnn_rnn_layer: _lstm,
    aten._cudnn_rnn: _recurrent,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
}
#: Operations of torch's registry whose first operand is only added, and those whose weight is the second.
_ADDS_FIRST = (aten.addmm, aten.baddbmm)
_CONVOLUTIONS = (aten.convolution, aten._convolution, aten.cudnn_convolution, aten.convolution_overrideable)
#: Copies that are the same weight in another place: autocast and contiguous() make them.
_COPIES = (aten._to_copy, aten.clone)


class _Counter(TorchDispatchMode):
    """Watches every operation, counts those with a formula and knows weights, their views and their copies by address."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if (address := _address(tensor)) is not None:
                self._names.setdefault(address, name)
        self._copies: list[Tensor] = []  # kept alive, or their addresses would be given to other tensors
        self._nonzeros: dict[Any, int] = {}
        self._dense = self._nonzero = 0
        self._layers: dict[str, tuple[int, int, int]] = {}
        self._uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = func._overloadpacket
        out = func(*args, **kwargs)
        for count, factors in products(operation, args, kwargs, out):
            self._count(count, factors)
        if operation in _COPIES and (name := self._name(args[0])) is not None and (address := _address(out)) is not None:
            self._names[address] = name
            self._copies.append(out)
        elif func.namespace not in ("aten", "prim", "prims", "profiler"):
            self._uncounted.add(str(operation))
        return out

    def _count(self, count: int, factors: Sequence[Any]) -> None:
        weight = next((x for x in factors if self._name(x) is not None), None)
        self._dense += count
        if weight is None:
            self._nonzero += count
            return
        name = self._name(weight) or ""
        kept = count * self._nonzeros_of(weight) // max(weight.numel(), 1)
        self._nonzero += kept
        calls, dense, nonzero = self._layers.get(name, (0, 0, 0))
        self._layers[name] = (calls + 1, dense + count, nonzero + kept)

    def _name(self, tensor: Any) -> str | None:
        return self._names.get(_address(tensor) or 0) if isinstance(tensor, Tensor) else None

    def _nonzeros_of(self, weight: Tensor) -> int:
        if weight.layout != torch.strided:
            return nonzeros(weight)
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        if key not in self._nonzeros:
            self._nonzeros[key] = nonzeros(weight)
        return self._nonzeros[key]

    def result(self) -> Macs:
        layers = tuple(LayerMacs(name, *counts) for name, counts in self._layers.items())
        return Macs(self._dense, self._nonzero, layers, tuple(sorted(self._uncounted)))


def products(operation: Any, args: Any, kwargs: Any, out: Any) -> Products:
    """The products that one call of an ATen operation does, by shapes alone: tensors on the meta device will do."""
    if operation in _FORMULAS:
        return _FORMULAS[operation](*args, **kwargs)
    if operation not in flop_registry:
        return ()
    first = 1 if operation in (*_ADDS_FIRST, *_CONVOLUTIONS) else 0
    last = first + (1 if operation in _CONVOLUTIONS else 2)
    return [(flop_registry[operation](*args, **kwargs, out_val=out) // 2, args[first:last])]


def _address(tensor: Tensor) -> int | None:
    """Address of a dense tensor's memory, or None where it has none or keeps its values elsewhere."""
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel() or tensor.is_meta:
        return None
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _plain_encoder() -> Iterator[None]:
    """Torch's fused transformer encoder layer hides its products from the counter: run the plain operations instead."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
