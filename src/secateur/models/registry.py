"""The registry of model sources: ``kind:what`` finds its loader here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from secateur.models.loaded import Loaded
from secateur.registry import Registry

#: ``loader(source, **options)``. ``dtype=True`` among its facts says that it takes the dtype and sets it itself.
Loader = Callable[..., Loaded]
MODELS: Registry[Loader] = Registry("model source")

_notes: ContextVar[list[Loaded] | None] = ContextVar("notes", default=None)


@contextmanager
def noting() -> Iterator[list[Loaded]]:
    """The list of all that `load_model` returns inside the block, for a loader that reaches it through another part."""
    notes: list[Loaded] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note(loaded: Loaded) -> Loaded:
    """`loaded`, written down where somebody is `noting`."""
    notes = _notes.get()
    if notes is not None:
        notes.append(loaded)
    return loaded
