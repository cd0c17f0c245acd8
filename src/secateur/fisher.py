"""The empirical Fisher matrix of a layer, in blocks along its diagonal: what WoodFisher and its kin invert.

Rows are per-sample gradients ``A [n, p]`` as in `LayerStats.grad_samples`; a block is ``A_b^T A_b / n + damp * mean(diag) I``.
No matrix is larger than a block, whatever the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_blocks(rows: Tensor, block: int, damp: float) -> Tensor:
    """``[blocks, block, block]`` of rows ``[n, p]``, damped by `damp` times the mean diagonal; p is filled up with ones.

    Where every gradient is zero the result is the identity, which ranks weights by magnitude.

    Example:
        >>> fisher_blocks(torch.tensor([[1.0, 1.0, 2.0]]), 2, 0.0).tolist()
        [[[1.0, 1.0], [1.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]]
    """
    count, width = rows.shape
    level = float(rows.square().sum(dtype=torch.float64)) / (count * width)
    fill = -width % block
    whole = torch.nn.functional.pad(rows, (0, fill)).reshape(count, -1, block).transpose(0, 1)
    result = whole.transpose(1, 2) @ whole / count
    result.diagonal(dim1=1, dim2=2).add_(damp * level if level > 0 else 1.0)
    if fill:
        result[-1].diagonal()[-fill:] = 1.0
    return result


def in_blocks(values: Tensor, block: int) -> Tensor:
    """``[p]`` as ``[blocks, block]``, filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % block)).reshape(-1, block)
