"""k-means in one dimension: Lloyd's iterations on sorted values, whose clusters are intervals and whose sums are differences.

An iteration costs k binary searches whatever the number of values, so the sort is all the work there is.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from secateur.errors import RecipeError, did_you_mean

#: Where the centroids begin: evenly over the range, evenly over the sorted values, or at values drawn at random.
Init = Literal["linear", "density", "random"]
INITS: tuple[Init, ...] = ("linear", "density", "random")
_ROUNDS = 300


def kmeans(values: np.ndarray, clusters: int, init: Init = "linear", seed: int = 0) -> np.ndarray:
    """``values [n]`` -> at most `clusters` centroids, float64, ascending: a local minimum of the squared distance.

    Source: Han, Mao and Dally 2016, Deep Compression, section 3, equation 2 and the three initialisations of 3.2; linear is
    the paper's choice, as it leaves centroids for the few large weights. Clusters that lose all values are dropped.

    Raises RecipeError for an unknown `init` or no clusters.

    >>> kmeans(np.array([0.0, 0.1, 0.9, 1.0]), 2).round(2).tolist()
    [0.05, 0.95]
    """
    if init not in INITS:
        raise RecipeError(f"unknown initialisation {init!r}{did_you_mean(str(init), INITS)} Known: {', '.join(INITS)}.")
    if clusters < 1:
        raise RecipeError(f"k-means needs at least one cluster, got {clusters}")
    ordered = np.sort(np.asarray(values, np.float64).reshape(-1))
    distinct = ordered[np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)] if ordered.size else ordered
    if len(distinct) <= clusters:
        return distinct
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = _begin(ordered, clusters, init, seed)
    for _ in range(_ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(ordered, _middles(centroids), "right"), [len(ordered)]])
        counts = np.diff(edges)
        alive = counts > 0
        moved = (sums[edges[1:]] - sums[edges[:-1]])[alive] / counts[alive]
        if len(moved) == len(centroids) and np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def nearest(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index of the nearest centroid of each value, the lower one where two are as near. `centroids` ascend."""
    return np.searchsorted(_middles(np.asarray(centroids, np.float64)), values, "left")


def _middles(centroids: np.ndarray) -> np.ndarray:
    return (centroids[1:] + centroids[:-1]) / 2


def _begin(ordered: np.ndarray, clusters: int, init: Init, seed: int) -> np.ndarray:
    if init == "linear":
        return np.linspace(ordered[0], ordered[-1], clusters)
    if init == "density":
        return np.unique(np.quantile(ordered, (np.arange(clusters) + 0.5) / clusters))
    return np.unique(np.random.default_rng(seed).choice(ordered, clusters, replace=False))
