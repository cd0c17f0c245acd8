"""Error and CPU time of the solvers on one layer of each shape, beside SparseGPT's published column loop written plainly.

    python benchmarks/solvers.py --shapes 3072x768 768x3072

A layer of ``out x in`` Gaussian weights; inputs are Gaussian features of log-normal size (sigma 0.7) mixed with an eighth as
many common factors. Half of the weights go. Errors are relative and squared, ``||(W' - W) X||^2 / ||W X||^2``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from secateur.patterns import make_pattern
from secateur.quadratic import output_error
from secateur.select import spread
from secateur.solvers import SOLVERS
from secateur.types import LayerStats

#: Label -> solver, pattern, whether scores are Wanda's.
ROWS = {
    "magnitude": ("keep", "element", False),
    "wanda": ("keep", "row", True),
    "sparsegpt": ("sparsegpt", "element", False),
    "sparsegpt 2:4": ("sparsegpt", "2:4", False),
    "admm": ("admm", "element", False),
    "alps": ("alps", "element", False),
    "alps 2:4": ("alps", "2:4", False),
    "least squares on wanda": ("least-squares", "row", True),
    "obc": ("obc", "row", False),
}
SLOW = ("least squares on wanda", "obc")


def layer(outputs: int, inputs: int, samples: int) -> LayerStats:
    """Weight and Gram matrix of the recipe above."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, factors = normal(outputs, inputs), max(1, inputs // 8)
    x = normal(samples, inputs) + normal(samples, factors) @ normal(factors, inputs) / factors**0.5
    x = x * (0.7 * normal(inputs)).exp()
    return LayerStats("layer", weight, gram=(x.t() @ x)[None])


def column_loop(stats: LayerStats, pattern: str, damp: float = 0.01, block: int = 128) -> Tensor:
    """SparseGPT by its paper's formulas: inverse, its Cholesky factor, and a rank-1 update after every column."""
    assert stats.gram is not None
    weight, form = stats.weight.clone(), stats.gram[0].clone()
    form.diagonal().add_(damp * form.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(form)), upper=True)
    for a in range(0, weight.shape[1], block):
        b = min(a + block, weight.shape[1])
        part, errors = weight[:, a:b].clone(), torch.zeros(len(weight), b - a)
        inner = upper[a:b, a:b]
        removed = torch.zeros_like(part, dtype=torch.bool)
        if pattern != "2:4":
            cost = part**2 / inner.diagonal() ** 2
            removed = cost <= cost.flatten().sort().values[cost.numel() // 2 - 1]
        for j in range(b - a):
            if pattern == "2:4" and j % 4 == 0:
                cost = part[:, j : j + 4] ** 2 / inner.diagonal()[j : j + 4] ** 2
                removed.scatter_(1, j + cost.topk(2, dim=1, largest=False).indices, True)
            column = part[:, j].clone()
            left = column.masked_fill(removed[:, j], 0)
            errors[:, j] = (column - left) / inner[j, j]
            part[:, j:] -= errors[:, j, None] @ inner[j, None, j:]
            part[:, j] = left
        weight[:, a:b] = part
        weight[:, b:] -= errors @ upper[a:b, b:]
    return weight


def ours(stats: LayerStats, label: str) -> Tensor:
    solver, spelling, by_wanda = ROWS[label]
    pattern = make_pattern(spelling)
    scores = stats.weight.abs()
    if by_wanda:
        scores = scores * stats.gram[0].diagonal().sqrt()  # type: ignore[index]
    folded = pattern.fold(scores)[..., 0]
    keep = spread(folded.numel() // 2, len(folded))
    return SOLVERS[solver].make(stats.weight, folded, keep, pattern, stats).weight


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """The result, and the least CPU time of a few runs."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = run()
        seconds.append(time.process_time() - started)
    return result, min(seconds)


def solved_afresh(stats: LayerStats, label: str) -> Tensor:
    assert stats.gram is not None
    return ours(LayerStats("layer", stats.weight, gram=stats.gram.clone()), label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["3072x768", "768x3072"])
    parser.add_argument("--slow", action="store_true", help="also least squares row by row and OBC: minutes to hours")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| out x in | method | relative output error | CPU seconds | zeros |\n|---|---|---|---|---|")
    for shape in given.shapes:
        outputs, inputs = map(int, shape.split("x"))
        stats = layer(outputs, inputs, 4 * inputs)
        gram = stats.gram
        assert gram is not None
        patterns = {"": "element", " 2:4": "2:4"}
        work = {f"column loop{words}": partial(column_loop, stats, pattern) for words, pattern in patterns.items()}
        for label in ROWS:
            if given.slow or label not in SLOW:
                # A fresh tensor each time: factorisations are kept for layers that share their Gram matrix.
                work[label] = partial(solved_afresh, stats, label)
        for label, run in work.items():
            weight, seconds = timed(run, given.repeats if "alps" not in label else 1)
            error = output_error(gram, stats.weight, weight)
            print(f"| {shape} | {label} | {error:.5f} | {seconds:.2f} | {int((weight == 0).sum())} |", flush=True)


if __name__ == "__main__":
    main()
