"""A model without weights, whose modules get them from a checkpoint while they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.stream.checkpoint import Checkpoint

Read = Callable[[str], Tensor]  #: the tensor that a checkpoint, or what was solved since, has under a name


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters of modules that are made inside the block take no memory; buffers are made as ever."""
    register = nn.Module.register_parameter

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = hollow  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Hollow:
    """Gives the parameters of `model`, made in `without_memory`, their weights for as long as they are held.

    A parameter that nobody holds has its shape and type, and NaN for values, which cannot be used in silence. A module that
    is called while its own parameters are not held gets them for that call. Raises ModelError for a parameter that the
    checkpoint does not have.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, read: Read):
        self.model, self._read = model, read
        self.names = _names(model, checkpoint)  #: of the checkpoint's tensors, by parameter name
        self._parameters: dict[int, tuple[nn.Parameter, str]] = {}
        self._held: set[int] = set()
        self._fill_places(checkpoint)
        self._hooks: list[Any] = []
        for module in model.modules():
            if module._parameters:
                self._hooks.append(module.register_forward_pre_hook(self._before, prepend=True))
                self._hooks.append(module.register_forward_hook(self._after, always_call=True))
        self._passing: dict[int, list[int]] = {}

    def _fill_places(self, checkpoint: Checkpoint) -> None:
        made: dict[int, nn.Parameter] = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for local, parameter in module._parameters.items():
                if parameter is None:
                    continue
                stored = self.names[f"{prefix}.{local}" if prefix else local]
                if id(parameter) not in made:
                    dtype = checkpoint.entry(stored).dtype
                    made[id(parameter)] = fresh = nn.Parameter(_nothing(parameter.shape, dtype), requires_grad=False)
                    self._parameters[id(fresh)] = (fresh, stored)
                module._parameters[local] = made[id(parameter)]

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """All weights of `module` are there inside the block."""
        taken = self._take(list(module.parameters()))
        try:
            yield
        finally:
            self._let_go(taken)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        self._passing.setdefault(id(module), []).extend(self._take(list(module.parameters(recurse=False))))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._let_go(self._passing.pop(id(module), []))

    def _take(self, parameters: list[nn.Parameter]) -> list[int]:
        taken = []
        for parameter in parameters:
            if id(parameter) in self._held:
                continue
            _, stored = self._parameters[id(parameter)]
            parameter.data = self._read(stored)
            self._held.add(id(parameter))
            taken.append(id(parameter))
        return taken

    def _let_go(self, taken: list[int]) -> None:
        for key in taken:
            parameter, _ = self._parameters[key]
            parameter.data = _nothing(parameter.shape, parameter.dtype)
            self._held.discard(key)


def _nothing(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """NaN of any shape in the memory of one value."""
    return torch.full((1,), torch.nan).to(dtype).expand(shape)


def _names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name of every parameter: its own, or that with the model's prefix added or left out."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    groups: dict[int, list[str]] = {}
    shapes: dict[int, torch.Size] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = parameter.shape
    found: dict[str, str] = {}
    for key, names in groups.items():
        spellings = [s for n in names for s in (n, prefix + n, n.removeprefix(prefix))]
        stored = next((s for s in spellings if s in checkpoint), None)
        if stored is None:
            raise ModelError(
                f"the checkpoint in {str(checkpoint.folder)!r} has no tensor {names[0]!r}, under which the model has a weight, "
                "so it cannot be streamed: load it whole with hf: and use sc.prune"
            )
        if tuple(shapes[key]) != checkpoint.entry(stored).shape:
            raise ModelError(
                f"{stored!r} is {checkpoint.entry(stored).shape} in the checkpoint and {tuple(shapes[key])} in the model: the "
                "config beside it is another model's"
            )
        found |= dict.fromkeys(names, stored)
    return found
