"""Norms of the inputs that each weight multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.errors import LayerError
from secateur.layers import CONVOLUTIONS, TRANSPOSED, Layer, is_conv1d
from secateur.stats.parallel import summed
from secateur.stats.reads import Reads
from secateur.stats.swap import swapped
from secateur.stats.watch import Call, Watcher

#: ``reader(call) -> sums of squares``, float64, shaped to broadcast against the parameter as it is stored; None = nothing read.
Reader = Callable[[Call], Tensor | None]


class InputNorms(Watcher[Tensor]):
    """Accumulates the squared norm of every input feature of `layers` over the forward passes made inside `recording`.

    Raises LayerError, naming the layer, for a weight whose inputs no hook can see.
    """

    unreadable = (
        "cannot be seen from outside the module: leave the layer out with ignore=, or take a criterion that needs no norms"
    )

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], reads: Reads | None = None):
        super().__init__(model, layers, reads)
        self._layers, self._sums = dict(layers), dict[str, Tensor]()

    def reader(self, module: nn.Module, local: str) -> Reader | None:
        """How the inputs of the parameter `local` of `module` are read; None where they cannot be."""
        return _reader(module, local)

    def attention_output(self, call: Call) -> Tensor:
        """How a call of an attention shows the inputs of its output projection."""
        return call.squares(attention_features(call))[None, :]

    def add(self, layer: str, read: Tensor) -> None:
        """Add one call's sums of squares."""
        self._sums[layer] = self._sums[layer] + read if layer in self._sums else read

    def finite(self) -> bool:
        """Whether every sum so far is finite: a cheap check, the sums are small."""
        return all(bool(torch.isfinite(s.sum())) for s in self._sums.values())

    @property
    def seen(self) -> set[str]:
        """Layers that were called."""
        return set(self._sums)

    def take(self) -> dict[str, Tensor]:
        """By layer the l2 norm of each input feature, float32, broadcastable against the canonical weight. The sums go.

        Under torch.distributed they are summed over all processes, each of which must have called every layer.
        """
        totals = summed({n: self._sums[n].clone() for n in self._layers if n in self._sums})
        self._sums.clear()
        return {n: self._layers[n].canonical(total.sqrt().float()) for n, total in totals.items()}


def _reader(module: nn.Module, local: str) -> Reader | None:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION.get(local)
    if isinstance(module, nn.RNNBase):
        return _first if local in ("weight_ih_l0", "weight_ih_l0_reverse") else None
    if isinstance(module, nn.RNNCellBase):
        return {"weight_ih": _first, "weight_hh": _cell_state}.get(local)
    if local != "weight":
        return None
    if isinstance(module, nn.Linear):
        return _first
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return _convolution
    if is_conv1d(module):
        return _conv1d
    return None


def _first(call: Call) -> Tensor:
    return call.squares(call.first())[None, :]


def _conv1d(call: Call) -> Tensor:
    return call.squares(call.first())[:, None]


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
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    batched = x.dim() == module.weight.dim()
    x = _squares(x) if batched else x.square()  # it is linear in x^2, so one sample can stand for all
    if slim and batched and groups == 1 and not transposed and _pointwise(module):
        steps = tuple(slice(None, None, s) for s in module.stride)
        return x[(slice(None), slice(None), *steps)].sum(tuple(range(2, x.dim())), keepdim=True, dtype=torch.float64)
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


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over the first dimension, which stays: sample by sample, so that the sum stays in the cache."""
    total = x.new_zeros(1, *x.shape[1:])
    for one in x:
        total.addcmul_(one, one)
    return total


def _pointwise(module: nn.Module) -> bool:
    """Whether every weight meets each position once, or each position of a stride."""
    return set(module.kernel_size) == {1} and set(module.padding) == {0}  # type: ignore[arg-type]


def _attention_input(call: Call) -> Tensor:
    query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
    if query is key and key is value:
        return call.squares(query)[None, :]
    return torch.stack([call.squares(t) for t in (query, key, value)]).repeat_interleave(query.shape[-1], dim=0)


def _attention_argument(index: int, name: str) -> Reader:
    return lambda call: call.squares(call.argument(index, name))[None, :]


def attention_features(call: Call) -> Tensor:
    """Inputs of an attention's output projection: the module's own output once that projection is the identity."""
    projection = call.module.out_proj
    width = projection.weight.shape[1]
    replaced = [(projection.weight, torch.eye(width, dtype=projection.weight.dtype, device=projection.weight.device))]
    if projection.bias is not None:
        replaced.append((projection.bias, torch.zeros_like(projection.bias)))
    with torch.no_grad(), swapped(call.module, replaced):
        return call.module(*call.args, **call.kwargs)[0]


_STOCK_FORWARDS = {kind.forward for kind in (*CONVOLUTIONS, *TRANSPOSED)}
_ATTENTION: dict[str, Reader] = {
    "in_proj_weight": _attention_input,
    "q_proj_weight": _attention_argument(0, "query"),
    "k_proj_weight": _attention_argument(1, "key"),
    "v_proj_weight": _attention_argument(2, "value"),
}
