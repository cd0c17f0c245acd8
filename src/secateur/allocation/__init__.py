"""How many units survive in each layer: one file an allocation, found by name."""

from __future__ import annotations

from typing import Any

from secateur.allocation.by_magnitude import by_magnitude
from secateur.allocation.dynamic import dynamic
from secateur.allocation.erk import erk
from secateur.allocation.globally import globally
from secateur.allocation.lamp import lamp
from secateur.allocation.owl import owl
from secateur.allocation.uniform import uniform
from secateur.registry import Registry

ALLOCATIONS: Registry[Any] = Registry("allocation")
ALLOCATIONS.register("uniform", source="Zhu and Gupta 2017, To prune, or not to prune", scores=False)(uniform)
ALLOCATIONS.register("global", source="Han et al. 2015; Lee et al. 2019, SNIP, eq. 6")(globally)
ALLOCATIONS.register("magnitude", source="Farina et al. 2024, MULTIFLOW, section 4.3")(by_magnitude)
ALLOCATIONS.register("erk", source="Evci et al. 2020, Rigging the Lottery, section 3 (after Mocanu et al. 2018)")(erk)
ALLOCATIONS.register("lamp", source="Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning, eq. 3")(lamp)
ALLOCATIONS.register("owl", source="Yin et al. 2024, Outlier Weighed Layerwise Sparsity (OWL)")(owl)
ALLOCATIONS.register("dynamic", source="Frantar and Alistarh 2022, SPDY (the dynamic program)", curves=True)(dynamic)

__all__ = ["ALLOCATIONS"]
