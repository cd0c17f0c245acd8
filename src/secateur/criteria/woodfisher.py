"""WoodFisher: Optimal Brain Surgeon's score with the empirical Fisher, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.errors import RecipeError
from secateur.fisher import fisher_blocks, in_blocks
from secateur.types import LayerStats, Need


@criterion(
    "woodfisher",
    needs={Need.GRAD_SAMPLES},
    source="Singh and Alistarh 2020, WoodFisher; Kurtic et al. 2022, The Optimal BERT Surgeon (Hassibi and Stork 1993, eq. 5)",
)
def woodfisher(layer: LayerStats, *, block: int = 50, damp: float = 0.1) -> Tensor:
    """``w_q^2 / (2 [F^-1]_qq)``: what removing the weight costs once the others of its block have made up for it.

    `F` is the mean of outer products of the gradients of single samples (or of small groups, where there are more than 1024),
    in blocks of `block` consecutive weights; `damp` times its mean diagonal is added. The papers add a constant instead.
    """
    if block < 1 or damp <= 0:
        raise RecipeError(f"woodfisher needs block >= 1 and damp > 0, got block={block}, damp={damp}")
    rows = layer.need(Need.GRAD_SAMPLES).flatten(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher_blocks(rows, block, damp)))
    loss = in_blocks(layer.weight.flatten(), block).square() / (2 * inverse.diagonal(dim1=1, dim2=2))
    return loss.flatten()[: layer.weight.numel()].reshape(layer.weight.shape)
