"""The compiled coders, where they are installed; numpy decodes and writes the same bytes where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from secateur.runtime import native

_pure: ContextVar[bool] = ContextVar("pure", default=False)


def compiled() -> ModuleType | None:
    """The extension that holds the coders, or None where it is missing or older than they are."""
    if _pure.get() or native.missing() is not None:
        return None
    extension = native.extension()
    return extension if hasattr(extension, "rans_encode") else None


@contextmanager
def numpy_only() -> Iterator[None]:
    """Inside the block nothing compiled is used: what the tests compare with."""
    token = _pure.set(True)
    try:
        yield
    finally:
        _pure.reset(token)
