"""Solvers choose the mask of a layer and its surviving weights together: one file a solver, found by name."""

from __future__ import annotations

from typing import Any

from secateur.registry import Registry
from secateur.solvers.admm import admm
from secateur.solvers.alps import alps
from secateur.solvers.chita import chita
from secateur.solvers.curve import error_curve
from secateur.solvers.keep import keep
from secateur.solvers.least_squares import least_squares
from secateur.solvers.obc import obc
from secateur.solvers.sparsegpt import sparsegpt
from secateur.solvers.woodfisher import woodfisher
from secateur.types import Need

_GRAM = frozenset({Need.GRAM})
_GRADIENTS = frozenset({Need.GRAD_SAMPLES})

SOLVERS: Registry[Any] = Registry("solver")
SOLVERS.register("keep", source="Han et al. 2015, Learning both Weights and Connections", needs=frozenset())(keep)
SOLVERS.register("least-squares", source="Hassibi and Stork 1993, Second Order Derivatives, eq. 5", needs=_GRAM)(least_squares)
SOLVERS.register("sparsegpt", source="Frantar and Alistarh 2023, SparseGPT, algorithm 1", needs=_GRAM)(sparsegpt)
SOLVERS.register("obc", source="Frantar, Singh and Alistarh 2022, Optimal Brain Compression, algorithms 1, 2", needs=_GRAM)(obc)
SOLVERS.register("admm", source="Boza 2024, Fast and Effective Weight Update for Pruned LLMs", needs=_GRAM)(admm)
SOLVERS.register("alps", source="Meng et al. 2024, ALPS, algorithms 1 and 2", needs=_GRAM)(alps)
SOLVERS.register(
    "woodfisher", source="Singh and Alistarh 2020, WoodFisher; Kurtic et al. 2022, The Optimal BERT Surgeon", needs=_GRADIENTS
)(woodfisher)
SOLVERS.register(
    "chita", source="Benbaki et al. 2023, Fast as CHITA: Pruning with Combinatorial Optimization", needs=_GRADIENTS
)(chita)

__all__ = ["SOLVERS", "error_curve"]
