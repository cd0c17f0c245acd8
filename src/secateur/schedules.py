"""When: how much sparsity is reached at which progress of the pruning.

A schedule is ``f(progress, target, *, options) -> sparsity``. `progress` runs from 0 to 1: step t of T (from 0) has
progress ``(t + 1) / T``, so the last one reaches the target. At progress 1 a schedule returns the target bit for bit;
it never decreases, and never leaves ``[initial, target]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.errors import RecipeError
from secateur.registry import Registry, bind
from secateur.types import Schedule

SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("one-shot", source="baseline: everything in a single step")
def one_shot(progress: float, target: float) -> float:
    """The whole target from the start.

    >>> one_shot(0.0, 0.9)
    0.9
    """
    _check(progress, target, 0.0)
    return target


@SCHEDULES.register("iterative", source="Han et al. 2015, Learning both Weights and Connections, section 3 (iterative pruning)")
def iterative(progress: float, target: float, *, initial: float = 0.0) -> float:
    """Equal steps of sparsity, ``s = initial + (target - initial) p``: with ten steps to 0.9, 0.09 of all weights each.

    `initial` is the sparsity at progress 0.

    >>> iterative(0.5, 0.9)
    0.45
    """
    _check(progress, target, initial)
    return _reach(progress, target, initial, target - (target - initial) * (1.0 - progress))


@SCHEDULES.register("cubic", source="Zhu and Gupta 2017, To prune, or not to prune, eq. 1")
def cubic(progress: float, target: float, *, initial: float = 0.0) -> float:
    """Fast while weights are redundant, slow near the target: ``s = target + (initial - target)(1 - p)^3``.

    `initial` is the paper's s_i, the sparsity at progress 0; p is its ``(t - t0)/(n dt)``.

    >>> round(cubic(0.5, 0.8), 12)
    0.7
    """
    _check(progress, target, initial)
    left = 1.0 - progress
    return _reach(progress, target, initial, target - (target - initial) * (left * left * left))


@SCHEDULES.register(
    "exponential",
    source="Tanaka et al. 2020, Pruning neural networks without any data (SynFlow), algorithm 1; "
    "de Jorge et al. 2021, Progressive skeletonization (IterSNIP), exponential schedule",
)
def exponential(progress: float, target: float, *, initial: float = 0.0) -> float:
    """Densities decay geometrically, each step keeping the same share: ``1 - s = (1 - b) ((1 - target)/(1 - b))^p``.

    `initial` is b, the sparsity at progress 0. With b = 0 this is ``density^p``, the schedule of SynFlow and IterSNIP;
    with b > 0 the first step starts from b already.

    >>> round(exponential(0.5, 0.99), 12)
    0.9
    """
    _check(progress, target, initial)
    density = (1.0 - initial) * ((1.0 - target) / (1.0 - initial)) ** progress
    return _reach(progress, target, initial, 1.0 - density)


def make_schedule(spec: str | Mapping[str, Any]) -> Schedule:
    """``f(progress, target)`` of a name, or of a mapping with the name and options; both checked.

    >>> make_schedule({"name": "iterative", "initial": 0.5})(0.0, 0.9)
    0.5
    """
    return bind(SCHEDULES, spec)[1]


def _reach(progress: float, target: float, initial: float, sparsity: float) -> float:
    """`sparsity`, kept in ``[initial, target]`` and exact at the end in spite of rounding."""
    return target if progress == 1.0 else min(max(sparsity, initial), target)


def _check(progress: float, target: float, initial: float) -> None:
    if not (math.isfinite(progress) and 0.0 <= progress <= 1.0):
        raise RecipeError(f"a schedule's progress must be a number from 0 to 1, got {progress}: pass (step + 1) / steps")
    if not (math.isfinite(target) and 0.0 <= target < 1.0):
        raise RecipeError(f"a schedule's target sparsity must lie in [0, 1), got {target}: 0.9 removes 90% of the weights")
    if not (math.isfinite(initial) and 0.0 <= initial <= target):
        raise RecipeError(f"a schedule's initial sparsity must lie in [0, {target}] (the target), got {initial}")
