"""Formats in which sparse weights are kept, the kernels that make them fast, and `deploy`, which chooses by measuring."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "deploy": "secateur.runtime.deploy",
    "save": "secateur.runtime.storage",
    "load": "secateur.runtime.storage",
    "SparseLinear": "secateur.runtime.modules",
    "SparseConv2d": "secateur.runtime.modules",
    "RUNTIMES": "secateur.runtime.runtimes",
}

if TYPE_CHECKING:
    from secateur.runtime.deploy import deploy as deploy
    from secateur.runtime.modules import SparseConv2d as SparseConv2d
    from secateur.runtime.modules import SparseLinear as SparseLinear
    from secateur.runtime.runtimes import RUNTIMES as RUNTIMES
    from secateur.runtime.storage import load as load
    from secateur.runtime.storage import save as save

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Loaded when first used: `measure` reads the formats, and `deploy` measures.
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'secateur.runtime' has no attribute {name!r}")
