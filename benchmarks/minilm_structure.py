"""MiniLM without a part of its heads, feed-forward neurons or layers, with and without repair: Spearman on STS-B.

    python benchmarks/minilm_structure.py [--cache ROWS.json] [--rows heads neurons layers] [--out PAGE]

Nothing is trained. Heads go by Michel's score ``E |sum over positions of a dL/da|`` (taylor_activation) or by magnitude,
feed-forward neurons by wanda_unit, layers by 1 - cosine of their input and output, measured once. The loss of the gradients
needs no labels: the sentence vector's component along a fixed random direction. Calibration takes sentences of WikiText-2's
validation text, the figure all STS-B test pairs. Every row is kept in the file that ``--cache`` names.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph import block_importance, drop_blocks, removable_blocks, trace
from secateur.types import Measurement

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import stsb
from calibrated import minilm
from conditions import Rows, conditions, show, table

#: Group of rows -> label -> recipe, or how many layers go.
ROWS: dict[str, dict[str, dict[str, Any] | int]] = {
    "heads": {
        f"{share:.0%} of heads, {criterion}{', repaired' if repair != 'none' else ''}": {
            "pattern": "head", "sparsity": share, "criterion": criterion, "repair": repair, "allocation": "uniform",
        }
        for share in (0.25, 0.5)
        for criterion, repair in (("magnitude", "none"), ("taylor_activation", "none"), ("taylor_activation", "least-squares"))
    },
    "neurons": {
        f"{share:.0%} of feed-forward neurons, wanda_unit{', repaired' if repair != 'none' else ''}": {
            "pattern": "ffn", "sparsity": share, "criterion": "wanda_unit", "repair": repair, "allocation": "uniform",
        }
        for share in (0.33, 0.5)
        for repair in ("none", "least-squares")
    },
    "layers": {f"{count} of 6 layers, cosine": count for count in (1, 2, 3)},
}  # fmt: skip


def projection(width: int) -> Callable[[nn.Module, Any], Tensor]:
    """A loss whose gradient is that of the sentence vector in a fixed random direction, mean over the batch."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0)) / width**0.5

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (stsb.vectors(model, batch) @ direction).mean()

    return loss


def pruned(model: nn.Module, recipe: dict[str, Any] | int, data: list[Any]) -> nn.Module:
    if isinstance(recipe, dict):
        loss = projection(model.config.hidden_size)
        return sc.prune(model, data=data, loss=loss, before=Measurement(0, 0, 0), **recipe).model
    blocks = removable_blocks(model, trace(model, data[0]))
    found = block_importance(model, blocks, data)
    layers = sorted((n for n in found if n.rpartition(".")[2].isdigit()), key=lambda n: found[n])
    return drop_blocks(model, data[0], layers[:recipe])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--samples", type=int, default=512, help="calibration sentences")
    parser.add_argument("--cache", type=Path, help="JSON file of rows that are known")
    parser.add_argument("--out", type=Path, help="write the page there")
    given = parser.parse_args()
    started = time.monotonic()
    known = Rows(given.cache)
    model, data, evaluate, _ = minilm(given.samples, sentences=True)
    for label, recipe in (pair for group in given.rows for pair in ROWS[group].items()):
        if label not in known:
            busy = time.process_time()
            smaller = pruned(model, recipe, data)
            busy = time.process_time() - busy
            count = sum(p.numel() for p in smaller.parameters())
            known.keep(label, [f"{count / 1e6:.2f} M", f"{evaluate(smaller)['spearman']:.4f}", f"{busy:.0f}"])
    page = [*__doc__.partition("\n\n    python")[0].splitlines(), *__doc__.rpartition("\n\n")[2].splitlines()]
    rows = [[label, *known[label]] for group in ROWS.values() for label in group if label in known]
    head = ["what goes", "parameters", "Spearman", "CPU seconds"]
    lines = ["# MiniLM without some of its heads, neurons or layers", "", *page, "", *table(head, rows), ""]
    lines.append(conditions(torch.get_num_threads(), "seed 0", time.monotonic() - started))
    show(lines, given.out)


if __name__ == "__main__":
    main()
