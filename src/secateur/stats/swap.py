"""Running a model with other tensors in place of its parameters, and putting the parameters back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def swapped(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Every parameter or buffer ``old`` of ``(old, new)`` is ``new`` inside the block, wherever in the model it occurs.

    ``torch.func.functional_call`` does this too, but leaves its tensors in a module that is found under two names
    (torch 2.13), and stale copies in recurrent modules.
    """
    new = {id(old): tensor for old, tensor in pairs}
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        members: dict[str, Any]
        for members in (module._parameters, module._buffers):
            places += [(members, name, old) for name, old in members.items() if old is not None and id(old) in new]
    try:
        for members, name, old in places:
            members[name] = new[id(old)]
        yield
    finally:
        for members, name, old in places:
            members[name] = old
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # they hold references of their own
