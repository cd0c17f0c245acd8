"""Cut: carry a plan out on a model, which becomes smaller for real."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.graph.blocks import drop
from secateur.graph.heads import refresh_heads
from secateur.graph.rewrite import apply_rewrites
from secateur.types import Cut, Plan

_INDEXED = re.compile(r"(.*)\[(\d+)\]$")


def cut(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """A model of really smaller modules, without hooks or masks; `model` itself stays as it is unless `inplace`.

    The plan may come from this model, or from `Plan.from_json`, for a freshly built model of the same architecture: so a cut
    model is restored without pickle, by ``cut(build(), plan)`` and then its state dict. Raises ModelError where the plan was
    made for another model.

    >>> from secateur.types import Cut
    >>> cut(nn.Linear(4, 2), Plan(cuts=(Cut("weight", 1, (0, 2)),)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    holders = _holders(model)
    indices = _indices(plan)
    _check({name: table[key] for name, ((table, key), *_) in holders.items()}, plan, indices)
    cuts: dict[str, list[Cut]] = {}
    for c in plan.cuts:
        cuts.setdefault(c.tensor, []).append(c)
    if inplace:  # tensor by tensor, so that no two copies of the model are there at once
        for name, own in cuts.items():
            (table, key), *others = holders[name]
            table[key] = _sliced(table[key], own, indices)
            for other, alias in others:
                other[alias] = table[key]
    else:
        olds = {name: holders[name][0][0][holders[name][0][1]] for name in cuts}
        model = copy.deepcopy(model, {id(old): _sliced(old, cuts[name], indices) for name, old in olds.items()})
    for name, value in plan.attributes.items():
        set_attribute(model, name, value)
    for module in model.modules():
        refresh(module)
    apply_rewrites(model, plan.rewrites)
    drop(model, plan.dropped)
    return model


def recut(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry a saved plan out on a freshly built model, in place, so that the cut model's state dict fits it."""
    return cut(model, plan, inplace=True)


def _indices(plan: Plan) -> dict[int, Tensor]:
    """The kept indices of all cuts as tensors, by the identity of the tuple: many cuts share one."""
    shared = {id(c.kept): c.kept for c in plan.cuts}
    return {key: torch.from_numpy(np.array(kept, dtype=np.int64)) for key, kept in shared.items()}


def _check(tensors: Mapping[str, Tensor], plan: Plan, indices: Mapping[int, Tensor]) -> None:
    highest = {key: int(index.max()) if len(index) else None for key, index in indices.items()}
    for layer in plan.layers:
        if layer.name in tensors and tuple(tensors[layer.name].shape) != tuple(layer.shape):
            raise ModelError(
                f"the plan was made for a {layer.name!r} of shape {tuple(layer.shape)}; this model's is "
                f"{tuple(tensors[layer.name].shape)}. Build the model as it was before the cut."
            )
    for c in plan.cuts:
        if c.tensor not in tensors:
            raise ModelError(f"the plan cuts {c.tensor!r}, which this model does not have. It was made for another model.")
        shape = tensors[c.tensor].shape
        last = highest[id(c.kept)]
        if c.dim >= len(shape) or last is None or last >= shape[c.dim]:
            raise ModelError(f"the plan keeps index {last} of dimension {c.dim} of {c.tensor!r}, shape {tuple(shape)}")


def _holders(model: nn.Module) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """For each name of a parameter or buffer all tables that hold the tensor, its own one first."""
    found: dict[str, tuple[int, dict[str, Any], str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    found[f"{path}.{key}" if path else key] = (id(tensor), table, key)
    same: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for tensor_id, table, key in found.values():
        same.setdefault(tensor_id, []).append((table, key))
    return {name: [(t, k), *(h for h in same[i] if h[0] is not t or h[1] != k)] for name, (i, t, k) in found.items()}


def _sliced(tensor: Tensor, cuts: Sequence[Cut], indices: Mapping[int, Tensor]) -> Tensor:
    """What the cuts leave of a tensor; a parameter of a parameter."""
    made = tensor.detach()
    wanted = [(c.dim, indices[id(c.kept)].to(made.device)) for c in cuts]
    if wanted[0][0] == 0 and len(wanted) > 1 and not made.is_meta:
        made = _some_rows(made, wanted[0][1], wanted[1:])
    else:
        for dim, index in wanted:
            made = made.index_select(dim, index)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _some_rows(tensor: Tensor, rows: Tensor, others: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Rows of a tensor, cut along other dimensions too, some rows at a time: what lies between stays in the cache."""
    shape = [len(rows), *tensor.shape[1:]]
    for dim, index in others:
        shape[dim] = len(index)
    made = tensor.new_empty(shape)
    some = max(1, _AT_ONCE[tensor.device.type == "cpu"] // max(tensor.shape[1:].numel(), 1))
    room = tensor.new_empty((min(some, len(rows)), *tensor.shape[1:]))
    for start in range(0, len(rows), some):
        part = room[: min(some, len(rows) - start)]
        torch.index_select(tensor, 0, rows[start : start + some], out=part)
        for dim, index in others[:-1]:
            part = part.index_select(dim, index)
        torch.index_select(part, *others[-1], out=made[start : start + some])
    return made


#: Values worked on at once: on other devices, and on the CPU, where they are to stay in the cache.
_AT_ONCE = (1 << 24, 1 << 18)


def set_attribute(model: nn.Module, name: str, value: int) -> None:
    """Set ``path.attribute`` or, for an item of a list or tuple, ``path.attribute[i]``."""
    indexed = _INDEXED.match(name)
    path, _, attribute = (indexed[1] if indexed else name).rpartition(".")
    holder: Any = model
    for part in path.split(".") if path else ():
        holder = getattr(holder, part)
    if indexed:
        items = list(getattr(holder, attribute))
        items[int(indexed[2])] = value
        setattr(holder, attribute, type(getattr(holder, attribute))(items))
    else:
        setattr(holder, attribute, value)


def refresh(module: nn.Module) -> None:
    """Bring what a module of torch says of its own sizes in line with its parameters."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.MultiheadAttention):
        refresh_heads(module)
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
        module.input_size = int(getattr(module, f"weight_ih{suffix}").shape[1])
        module.hidden_size = int(getattr(module, f"weight_hh{suffix}").shape[1])
    if not isinstance(weight, Tensor):
        mean = getattr(module, "running_mean", None)
        if isinstance(mean, Tensor) and hasattr(module, "num_features"):
            setattr(module, "num_features", mean.shape[0])  # noqa: B010
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
