"""The tensors of a model as they are stored: each once, with all its names; and how they get back into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import ArtifactError
from secateur.export.encode import same_bits
from secateur.export.manifest import TORCH_DTYPES, Kind, TensorEntry

_SHOWN = 8  # names in one error message


@dataclass(frozen=True)
class State:
    """`tensors` by first name with their kind, and `aliases`: further name -> first name."""

    tensors: Mapping[str, tuple[Kind, Tensor]]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class _Slot:
    """Where a tensor hangs in a model."""

    owner: nn.Module
    local: str
    kind: Kind
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        """Hang `tensor` there, unless it already does. Modules that keep lists of their weights (RNNs) hear of it."""
        if getattr(self.owner, self.local) is not tensor:
            setattr(self.owner, self.local, tensor)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel, whose wrappers rename its tensors."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def state_of(model: nn.Module) -> State:
    """All parameters and buffers, persistent or not. Raises ArtifactError for state that tensors cannot express.

    Two names are one tensor where they are the same object or the same view of the same memory.
    """
    slots = _slots(unwrapped(model))
    tensors: dict[str, tuple[Kind, Tensor]] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, slot in slots.items():
        _check_storable(name, slot.tensor)
        key = (slot.kind == "parameter", *_memory(slot.tensor))
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = (slot.kind, slot.tensor)
    _check_no_more_state(unwrapped(model), slots)
    return State(tensors, aliases)


class Filler:
    """Puts stored tensors into `model`, one at a time: checks everything that names and shapes tell first.

    Raises ArtifactError where names are missing, unexpected or of another shape. Parameters and buffers take the stored
    dtype and keep their device; tensors on the meta device are made on the CPU.
    """

    def __init__(self, model: nn.Module, entries: Mapping[str, TensorEntry], aliases: Mapping[str, str]):
        self.model = model
        self._slots = _slots(unwrapped(model))
        self._groups: dict[str, list[str]] = {name: [name] for name in entries}
        for alias, name in aliases.items():
            self._groups[name].append(alias)
        self._check_names(entries)
        self._check_types(entries)
        self._done: dict[int, tuple[str, Tensor]] = {}  # id of a model's tensor -> stored name, tensor that now holds it

    def fill(self, name: str, value: Tensor) -> None:
        """Put the tensor stored as `name` where it and its aliases belong, tied."""
        slots = [self._slots[n] for n in self._groups[name] if n in self._slots]
        self._fill(name, [s for s in slots if s.kind == "parameter"], value)
        self._fill(name, [s for s in slots if s.kind != "parameter"], value)

    def _fill(self, name: str, slots: list[_Slot], value: Tensor) -> None:
        if not slots:
            return
        first = slots[0].tensor
        if id(first) in self._done:
            other, target = self._done[id(first)]
            if not same_bits(target, value):
                raise ArtifactError(
                    f"the model ties {name!r} to {other!r}, but they were saved with different values. "
                    "Pass a model in which they are not tied."
                )
        else:
            target = _filled(first, value)
        for slot in slots:
            self._done.setdefault(id(slot.tensor), (name, target))
            slot.put(target)

    def _check_names(self, entries: Mapping[str, TensorEntry]) -> None:
        stored = {n: entries[first].kind for first, names in self._groups.items() for n in names}
        missing = [n for n, s in self._slots.items() if n not in stored and s.kind != "transient"]
        unexpected = [n for n, kind in stored.items() if n not in self._slots and kind != "transient"]
        if missing or unexpected:
            raise ShapeMismatch(
                "the artifact was saved from another model."
                + (f" The model has, and the artifact lacks: {_some(missing)}." if missing else "")
                + (f" The artifact has, and the model lacks: {_some(unexpected)}." if unexpected else "")
            )

    def _check_types(self, entries: Mapping[str, TensorEntry]) -> None:
        for name, slot, entry in self._pairs(entries):
            stored, own = TORCH_DTYPES[entry.dtype], slot.tensor.dtype
            if (stored.is_floating_point, stored.is_complex) != (own.is_floating_point, own.is_complex):
                raise ArtifactError(f"the tensor {name!r} was saved as {entry.dtype}; the model's is {own}")
        wrong = [
            f"{name!r} {entry.shape} (the model's is {list(slot.tensor.shape)})"
            for name, slot, entry in self._pairs(entries)
            if list(slot.tensor.shape) != entry.shape and slot.kind != "transient"
        ]
        if wrong:
            raise ShapeMismatch(f"the artifact's shapes are not the model's: {_some(wrong)}")

    def _pairs(self, entries: Mapping[str, TensorEntry]) -> Iterable[tuple[str, _Slot, TensorEntry]]:
        for first, names in self._groups.items():
            for name in names:
                if name in self._slots:
                    yield name, self._slots[name], entries[first]


class ShapeMismatch(ArtifactError):
    """The stored tensors have other names or shapes than the model's: it was cut, or it is another model."""


def _filled(target: Tensor, value: Tensor) -> Tensor:
    """`target` with the bits of `value`: in place where that is possible, else a new tensor of the same class."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape, strict=True))
    if target.dtype == value.dtype and target.shape == value.shape and not target.is_meta and not overlapping:
        with torch.no_grad():
            target.copy_(value)
        return target
    value = value if target.is_meta else value.to(target.device)
    if isinstance(target, nn.Parameter):
        if target.is_meta:
            return nn.Parameter(value, requires_grad=target.requires_grad)
        target.data = value
        return target
    return value


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Every name of every parameter and buffer."""
    found: dict[str, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for local, parameter in module._parameters.items():
            if parameter is not None:
                found[dot + local] = _Slot(module, local, "parameter", parameter)
        for local, buffer in module._buffers.items():
            if buffer is not None:
                kind: Kind = "transient" if local in module._non_persistent_buffers_set else "buffer"
                found[dot + local] = _Slot(module, local, kind, buffer)
    return found


def _memory(tensor: Tensor) -> tuple[object, ...]:
    if tensor.numel() == 0 or tensor.data_ptr() == 0:
        return (id(tensor),)
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _check_storable(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ArtifactError(f"{name!r} is not initialised yet: run the model once before saving it")
    plain = tensor.detach()
    if tensor.is_meta:
        raise ArtifactError(f"{name!r} is on the meta device and has no values: load the weights before saving")
    if type(plain) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        what = f"{type(plain).__name__}, {tensor.layout}, {tensor.dtype}"
        raise ArtifactError(f"{name!r} is not a plain dense tensor ({what}); convert it to one before saving")
    if tensor.dtype not in TORCH_DTYPES.values():
        raise ArtifactError(
            f"{name!r} has the dtype {tensor.dtype}, which cannot be stored. It can be: {', '.join(TORCH_DTYPES)}."
        )


def _check_no_more_state(model: nn.Module, slots: Mapping[str, _Slot]) -> None:
    """Refuse modules that keep state elsewhere (packed quantised weights, extra state): it would be lost in silence."""
    for name, value in model.state_dict().items():
        if name not in slots and value is not None:
            raise ArtifactError(
                f"the model's state dict holds {name!r} ({type(value).__name__}), which is neither a parameter nor a buffer "
                "and would be lost. Save such modules yourself, or turn it into a buffer."
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(str(n) for n in names[:_SHOWN]) + more
