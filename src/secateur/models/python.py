"""``module:callable`` and ``file.py:callable``: a network that the user's own code builds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from secateur.errors import ModelError
from secateur.models.loaded import Loaded
from secateur.models.registry import MODELS
from secateur.models.safety import reseed
from secateur.sources import CALLABLE, Source, call, find_callable


@MODELS.register(CALLABLE, source="the user's own code")
def from_callable(source: Source, **options: Any) -> Loaded:
    """``module:callable?key=value`` or ``file.py:callable``: called with the options; returns an nn.Module or a `Loaded`."""
    function, source = find_callable(source)
    if isinstance(function, nn.Module):
        raise ModelError(f"{source.rest!r} is a network, not a function that makes one: every load would share its weights")
    reseed()
    made = call(function, source)
    if isinstance(made, nn.Module):
        made = Loaded(made)
    if not isinstance(made, Loaded):
        raise ModelError(f"{source.rest!r} returned {_what(made)}; expected a torch.nn.Module")
    return replace(made, source=str(source), name=made.name or _name(source))


def _name(source: Source) -> str:
    place, _, name = source.rest.rpartition(":")
    return f"{place.replace(chr(92), '/').rsplit('/', 1)[-1].removesuffix('.py')}:{name}"


def _what(value: Any) -> str:
    if isinstance(value, dict):
        return "a dict: a state dict has no architecture, so load it into a network first"
    return "nothing" if value is None else f"a {type(value).__name__}"
