"""Parameters, nonzeros and bytes in memory of a model, each tensor counted once however many names it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur.errors import ModelError


@dataclass(frozen=True)
class LayerSize:
    """One parameter: its first name, shape, number of values, how many of them are not zero, and its bytes in memory."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    bytes_memory: int


@dataclass(frozen=True)
class Sizes:
    """A model's parameters, nonzeros and bytes. Buffers count among the bytes only."""

    parameters: int
    nonzeros: int
    bytes_memory: int
    layers: tuple[LayerSize, ...]


def sizes(model: nn.Module) -> Sizes:
    """Count a model's parameters, nonzeros and bytes in memory.

    A parameter tied to several modules counts once, under its first name. `bytes_memory` is the memory that parameters
    and buffers hold, each storage once: a slice that keeps a larger tensor alive costs all of that tensor. Sparse and
    wrapped tensors count what they store, indices included. Raises ModelError for parameters without values.

    >>> sizes(nn.Linear(3, 2)).parameters
    8
    """
    layers = tuple(_layer_size(name, parameter) for name, parameter in model.named_parameters())
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages.update(_storages(tensor))
    return Sizes(
        parameters=sum(x.parameters for x in layers),
        nonzeros=sum(x.nonzeros for x in layers),
        bytes_memory=sum(storages.values()),
        layers=layers,
    )


def nonzeros(tensor: Tensor) -> int:
    """Number of values that are not zero. NaN is not zero; what a sparse tensor does not store is."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()._values()
    elif tensor.layout != torch.strided:
        tensor = tensor.values()
    return int(tensor.count_nonzero())


def _layer_size(name: str, parameter: Tensor) -> LayerSize:
    if parameter.is_meta or nn.parameter.is_lazy(parameter):
        raise ModelError(f"the parameter {name!r} has no values yet: load the weights, or run lazy modules once, first.")
    size = sum(_storages(parameter).values())
    return LayerSize(name, tuple(parameter.shape), parameter.numel(), nonzeros(parameter), size)


def _storages(tensor: Tensor) -> dict[int, int]:
    """Address -> bytes of all memory behind a tensor."""
    storages = (part.untyped_storage() for part in dense_parts(tensor.detach()))
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain dense tensors of which a sparse or wrapped tensor is made."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from dense_parts(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor
