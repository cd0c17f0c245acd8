"""Secateur prunes trained neural networks, repairs them, and proves what was lost and what was won.

Importing this package opens no file and imports no torch: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "hold": "secateur.train.hold",
    "prune": "secateur.prune",
}

if TYPE_CHECKING:
    from secateur.prune import prune as prune
    from secateur.train.hold import hold as hold

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
