"""Max-pooling of 2 x 2 as three elementwise maxima, which torch does faster on CPUs than its own pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SlicedMaxPool2d(nn.Module):
    """``nn.MaxPool2d(2)``: the larger of neighbouring rows, then of neighbouring columns. An odd last one is left out."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., height, width]`` -> ``[..., height // 2, width // 2]``."""
        height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
        rows = torch.maximum(x[..., 0:height:2, :width], x[..., 1:height:2, :width])
        return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def refuses(pool: nn.Module) -> str | None:
    """Why `SlicedMaxPool2d` does not compute the same as `pool`, or None where it does."""
    if type(pool) is not nn.MaxPool2d:
        return f"it is a {type(pool).__name__}"
    sides = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    if [s if isinstance(s, tuple) else (s, s) for s in sides] != [(2, 2), (2, 2), (0, 0), (1, 1)]:
        return "only windows of 2 x 2 without overlap or padding can be sliced"
    return "it rounds sizes up or returns indices" if pool.ceil_mode or pool.return_indices else None
