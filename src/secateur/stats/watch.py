"""Watching the inputs of layers by hooks that are there during one forward pass only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from secateur.data.batches import Batch, token_mask
from secateur.errors import LayerError
from secateur.layers import Layer
from secateur.stats.reads import Reads

T = TypeVar("T")

#: Whether a reader is at work: some call the module again, which no watcher must take for a call of the model's.
_reading: ContextVar[bool] = ContextVar("reading", default=False)


@dataclass
class Last:
    """The tensor whose squares were summed last, and the sums: queries, keys and values mostly read the same one."""

    of: tuple[Any, ...] = ()  #: the tensor, its version, and the modalities of who read it
    sums: Tensor = field(default_factory=lambda: torch.empty(0))
    unmasked: bool = False  #: as of a `Call`


class Call:
    """One call of a module: its arguments, and the padding mask of the batch it belongs to.

    Where a model reads more than tokens, `reads` knows which positions of what reaches the parameters `names` are tokens.
    Calls of one forward pass share `last`.
    """

    def __init__(
        self,
        module: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        mask: Tensor | None,
        reads: Reads | None = None,
        names: Sequence[str] = (),
        last: Last | None = None,
    ):
        self.module, self.args, self.kwargs, self.mask = module, args, dict(kwargs), mask
        self._reads, self._names, self._last = reads, names, last or Last()
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
        modalities = frozenset() if self._reads is None else self._reads.reaching(self._names)
        last = self._last
        if not last.of or last.of[0] is not data or last.of[1:] != (data._version, modalities):
            sums = torch.linalg.vector_norm(self.rows(data), dim=0, dtype=torch.float64).square()
            last.of, last.sums, last.unmasked = (data, data._version, modalities), sums, self.unmasked
        self.unmasked |= last.unmasked
        return last.sums

    def rows(self, data: Tensor) -> Tensor:
        """``[..., features]`` as ``[n, features]``, padding left out."""
        data = data.detach()
        flat = data.reshape(-1, data.shape[-1])
        mask = self.mask
        if mask is not None and self._reads is not None:
            mask = self._reads.positions(self._names, tuple(data.shape), mask)
        if mask is None:
            return flat
        mask = mask.to(data.device)
        if data.dim() >= 3 and data.shape[:2] == mask.shape:
            return data[mask].reshape(-1, data.shape[-1])
        if data.dim() == 2 and len(flat) == mask.numel():
            return flat[mask.flatten()]
        self.unmasked |= data.dim() >= 3
        return flat


class Watcher(ABC, Generic[T]):
    """Reads the inputs of `layers` in the forward passes made inside `recording`; a subclass says how and keeps the sums."""

    unreadable: str  #: what is wrong with layers that have no reader, and the remedy

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], reads: Reads | None = None):
        self._reads = reads
        self._names = {n: (layer.name, *layer.aliases) for n, layer in layers.items()}
        self._sources: list[tuple[nn.Module, str, Callable[[Call], T | None]]] = []
        self._unmasked: set[str] = set()
        for layer in layers.values():
            sources = [self.source(model, name) for name in (layer.name, *layer.aliases)]
            # A module shared under two names is one module: hook it once.
            self._sources += [(m, layer.name, read) for m, read in {id(m): (m, read) for m, read in sources}.values()]

    def source(self, model: nn.Module, name: str) -> tuple[nn.Module, Callable[[Call], T | None]]:
        """The module whose calls show the inputs of the parameter `name`, and how to read them; LayerError where none does."""
        if (attention := attention_parent(model, name)) is not None:
            return attention, self.attention_output
        module_name, _, local = name.rpartition(".")
        module = model.get_submodule(module_name)
        reader = self.reader(module, local)
        if reader is None:
            raise LayerError(f"the inputs of {name!r} ({type(module).__name__}) {self.unreadable}")
        return module, reader

    @abstractmethod
    def reader(self, module: nn.Module, local: str) -> Callable[[Call], T | None] | None:
        """How the inputs of the parameter `local` of `module` are read; None where they cannot be."""

    @abstractmethod
    def attention_output(self, call: Call) -> T | None:
        """How a call of an attention shows the inputs of its output projection."""

    @abstractmethod
    def add(self, layer: str, read: T) -> None:
        """Take in what a call of the layer showed."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether everything read so far is finite."""

    @property
    @abstractmethod
    def seen(self) -> set[str]:
        """Layers that were called."""

    @property
    def unmasked(self) -> list[str]:
        """Layers whose inputs have positions that do not line up with the padding mask: padding counts there."""
        return sorted(self._unmasked)

    @contextmanager
    def recording(self, batch: Batch) -> Iterator[None]:
        """Hooks on for one forward pass of `batch`; off afterwards, whatever happens."""
        mask, last = token_mask(batch), Last()
        handles = [
            module.register_forward_pre_hook(self._hook(layer, reader, mask, last), with_kwargs=True)
            for module, layer, reader in self._sources
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: str, reader: Callable[[Call], T | None], mask: Tensor | None, last: Last) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _reading.get():
                return
            call = Call(module, args, kwargs, mask, self._reads, self._names[layer], last)
            token = _reading.set(True)
            try:
                read = reader(call)
                if read is not None:
                    self.add(layer, read)
            finally:
                _reading.reset(token)
            if call.unmasked:
                self._unmasked.add(layer)

        return hook


def attention_parent(model: nn.Module, name: str) -> nn.MultiheadAttention | None:
    """The attention module whose output projection the parameter `name` belongs to: it never calls that projection."""
    module_name = name.rpartition(".")[0]
    parent = model.get_submodule(module_name.rpartition(".")[0]) if module_name else None
    is_projection = isinstance(parent, nn.MultiheadAttention) and model.get_submodule(module_name) is parent.out_proj
    return parent if is_projection else None  # type: ignore[return-value]
