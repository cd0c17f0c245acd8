"""How a layer's output error grows with its sparsity: what an allocation by dynamic programming looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.quadratic import output_error
from secateur.select import removed_count, spread
from secateur.solvers.keep import keep
from secateur.solvers.sparsegpt import sparsegpt
from secateur.types import LayerStats, Need, Pattern

LEVELS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  #: sparsities at which the error is found
_FEW = 32  # units in a group: then every whole number of them


def error_curve(weight: Tensor, scores: Tensor, pattern: Pattern, stats: LayerStats) -> dict[float, float]:
    """Relative output error by sparsity, at `LEVELS`, or at each whole number of units kept where groups are small (n:m).

    Found by SparseGPT, whatever solver prunes afterwards: the order of layers is much the same and it is the fastest. Whole
    outputs, which it does not repair, are masked by `scores`.
    """
    gram = stats.need(Need.GRAM)
    groups, units = scores.shape
    levels = [1 - k / units for k in range(1, units)] if units <= _FEW else LEVELS
    solve = keep if pattern.whole_outputs else sparsegpt
    curve = {}
    for sparsity in levels:
        kept = spread(groups * units - removed_count(groups * units, sparsity), groups).to(scores.device)
        found = solve(weight, scores, kept, pattern, stats)  # type: ignore[arg-type]
        curve[sparsity] = output_error(gram, weight, torch.as_tensor(found.weight))
    return curve
