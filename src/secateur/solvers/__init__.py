"""Solvers choose the mask of a layer and its surviving weights together: one file a solver, found by name."""

from __future__ import annotations

from typing import Any

from secateur.registry import Registry
from secateur.solvers.keep import keep

SOLVERS: Registry[Any] = Registry("solver")
SOLVERS.register("keep", source="Han et al. 2015, Learning both Weights and Connections", needs=frozenset())(keep)

__all__ = ["SOLVERS"]
