"""The registry of model sources: ``kind:what`` finds its loader here."""

from __future__ import annotations

from collections.abc import Callable

from secateur.models.loaded import Loaded
from secateur.registry import Registry
from secateur.sources import Source

#: A loader takes the parsed source and, as keywords, its options. ``dtype`` in the facts says that it sets the dtype itself.
Loader = Callable[..., Loaded]
MODELS: Registry[Loader] = Registry("model source")

__all__ = ["MODELS", "Loader", "Source"]
