"""Norms of the inputs that each weight multiplies, read by hooks that are there during the forward pass only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from secateur.data.batches import Batch, token_mask
from secateur.errors import LayerError
from secateur.layers import CONVOLUTIONS, TRANSPOSED, Layer
from secateur.stats.swap import swapped

#: ``reader(call) -> sums of squares``, float64, shaped to broadcast against the parameter as it is stored; None = nothing read.
Reader = Callable[["Call"], "Tensor | None"]


class Call:
    """One call of a module: its arguments, and the padding mask of the batch it belongs to."""

    def __init__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None):
        self.module, self.args, self.kwargs, self.mask = module, args, dict(kwargs), mask
        self.unmasked = False  #: whether an input with a positions dimension did not line up with the mask

    def argument(self, index: int, name: str) -> Any:
        """The argument at `index` or by `name`; None where it was not given."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name)

    def first(self) -> Any:
        """The first argument, however it is named."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def squares(self, features: Tensor | PackedSequence) -> Tensor:
        """Sum of squares of ``[..., features]`` over everything but the last dimension, padding left out. float64."""
        data = features.data if isinstance(features, PackedSequence) else features
        rows = self._real_rows(data.detach())
        return torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()

    def _real_rows(self, data: Tensor) -> Tensor:
        flat = data.reshape(-1, data.shape[-1])
        if self.mask is None:
            return flat
        mask = self.mask.to(data.device)
        if data.dim() >= 3 and data.shape[:2] == mask.shape:
            return data[mask].reshape(-1, data.shape[-1])
        if data.dim() == 2 and len(flat) == mask.numel():
            return flat[mask.flatten()]
        self.unmasked |= data.dim() >= 3
        return flat


class InputNorms:
    """Accumulates the squared norm of every input feature of `layers` over the forward passes made inside `recording`.

    Raises LayerError, naming the layer, for a weight whose inputs no hook can see.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]):
        self._sums: dict[str, Tensor] = {}
        self._sources: list[tuple[nn.Module, str, Reader]] = []
        self._busy = False
        self._unmasked: set[str] = set()
        for layer in layers.values():
            sources = [_source(model, name) for name in (layer.name, *layer.aliases)]
            # A module shared under two names is one module: hook it once.
            self._sources += [(m, layer.name, read) for m, read in {id(m): (m, read) for m, read in sources}.values()]

    @contextmanager
    def recording(self, batch: Batch) -> Iterator[None]:
        """Hooks on for one forward pass of `batch`; off afterwards, whatever happens."""
        mask = token_mask(batch)
        handles = [
            module.register_forward_pre_hook(self._hook(layer, reader, mask), with_kwargs=True)
            for module, layer, reader in self._sources
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: str, reader: Reader, mask: Tensor | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._busy:  # the reader itself calls the module
                return
            call = Call(module, args, kwargs, mask)
            self._busy = True
            try:
                sums = reader(call)
            finally:
                self._busy = False
            if sums is not None:
                self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums
            if call.unmasked:
                self._unmasked.add(layer)

        return hook

    def finite(self) -> bool:
        """Whether every sum so far is finite: a cheap check, the sums are small."""
        return all(bool(torch.isfinite(s.sum())) for s in self._sums.values())

    @property
    def seen(self) -> set[str]:
        """Layers that were called."""
        return set(self._sums)

    @property
    def unmasked(self) -> list[str]:
        """Layers whose inputs have positions that do not line up with the padding mask: padding counts there."""
        return sorted(self._unmasked)

    def norm(self, layer: Layer) -> Tensor:
        """The l2 norm of each input feature, float32, broadcastable against the canonical weight."""
        return layer.canonical(self._sums[layer.name].sqrt().float())


def _source(model: nn.Module, name: str) -> tuple[nn.Module, Reader]:
    """The module whose calls show the inputs of the parameter `name`, and how to read them."""
    module_name, _, local = name.rpartition(".")
    module = model.get_submodule(module_name)
    parent = model.get_submodule(module_name.rpartition(".")[0]) if module_name else None
    if isinstance(parent, nn.MultiheadAttention) and module is parent.out_proj:
        return parent, _attention_output
    reader = _reader(module, local)
    if reader is None:
        raise LayerError(
            f"the inputs of {name!r} ({type(module).__name__}) cannot be seen from outside the module: "
            "leave the layer out with ignore=, or take a criterion that needs no input norms"
        )
    return module, reader


def _reader(module: nn.Module, local: str) -> Reader | None:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION.get(local)
    if isinstance(module, nn.RNNBase):
        return _recurrent_input if local in ("weight_ih_l0", "weight_ih_l0_reverse") else None
    if isinstance(module, nn.RNNCellBase):
        return {"weight_ih": _recurrent_input, "weight_hh": _cell_state}.get(local)
    if local != "weight":
        return None
    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return _convolution
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return _conv1d
    return None


def _linear(call: Call) -> Tensor:
    return call.squares(call.first())[None, :]


def _conv1d(call: Call) -> Tensor:
    return call.squares(call.first())[:, None]


def _recurrent_input(call: Call) -> Tensor:
    return call.squares(call.first())[None, :]


def _cell_state(call: Call) -> Tensor | None:
    state = call.argument(1, "hx")
    if state is None:  # a state of zeros
        return torch.zeros(1, call.module.hidden_size, dtype=torch.float64, device=call.first().device)
    return call.squares(state[0] if isinstance(state, tuple) else state)[None, :]


def _convolution(call: Call) -> Tensor:
    """Sum of ``x^2`` over the positions at which each kernel entry meets each input channel.

    The gradient of ``sum(conv(x^2, w))`` in w is just that, with the module's own stride, padding, dilation and groups,
    transposed or not. One output channel a group is enough, where the module's forward is torch's own.
    """
    module = call.module
    transposed, groups = isinstance(module, TRANSPOSED), int(module.groups)
    shape = list(module.weight.shape)
    slim = type(module).forward in _STOCK_FORWARDS
    if slim:
        shape[1 if transposed else 0] = 1 if transposed else groups
    x = call.first().detach()
    x = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    probe = torch.ones(shape, dtype=x.dtype, device=x.device, requires_grad=True)
    replaced = [(module.weight, probe)]
    if module.bias is not None:
        outputs = shape[1] * groups if transposed else shape[0]
        replaced.append((module.bias, torch.zeros(outputs, dtype=x.dtype, device=x.device)))
    args = (x, *call.args[1:]) if call.args else ()
    kwargs = {k: x if i == 0 and not args else v for i, (k, v) in enumerate(call.kwargs.items())}
    with torch.enable_grad(), swapped(module, replaced):
        (sums,) = torch.autograd.grad(module(*args, **kwargs).sum(), probe)
    if bool((sums < 0).any()):
        raise LayerError(
            f"a {type(module).__name__} transforms its weight before using it, so its inputs have no norm for each weight: "
            "leave it out with ignore=, or take a criterion that needs no input norms"
        )
    if slim and groups > 1 and not transposed:
        sums = sums.repeat_interleave(module.weight.shape[0] // groups, dim=0)
    return sums.double()


def _attention_input(call: Call) -> Tensor:
    query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
    if query is key and key is value:
        return call.squares(query)[None, :]
    return torch.stack([call.squares(t) for t in (query, key, value)]).repeat_interleave(query.shape[-1], dim=0)


def _attention_argument(index: int, name: str) -> Reader:
    return lambda call: call.squares(call.argument(index, name))[None, :]


def _attention_output(call: Call) -> Tensor:
    """Inputs of the output projection: the module's own output once that projection is the identity."""
    projection = call.module.out_proj
    width = projection.weight.shape[1]
    replaced = [(projection.weight, torch.eye(width, dtype=projection.weight.dtype, device=projection.weight.device))]
    if projection.bias is not None:
        replaced.append((projection.bias, torch.zeros_like(projection.bias)))
    with torch.no_grad(), swapped(call.module, replaced):
        out = call.module(*call.args, **call.kwargs)
    return call.squares(out[0])[None, :]


_STOCK_FORWARDS = {kind.forward for kind in (*CONVOLUTIONS, *TRANSPOSED)}
_ATTENTION: dict[str, Reader] = {
    "in_proj_weight": _attention_input,
    "q_proj_weight": _attention_argument(0, "query"),
    "k_proj_weight": _attention_argument(1, "key"),
    "v_proj_weight": _attention_argument(2, "value"),
}
