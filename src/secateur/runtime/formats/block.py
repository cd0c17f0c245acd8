"""Blocks: a matrix kept as its nonzero tiles of `rows` x `cols`, in block-CSR order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import LayerError


class Blocks(NamedTuple):
    """The nonzero tiles of a matrix ``[out, in]``."""

    indptr: Tensor  #: int64 ``[out / rows + 1]``: row of tiles r has the tiles ``indptr[r] : indptr[r + 1]``
    indices: Tensor  #: int64 ``[tiles]``: column of tiles, ascending within a row
    values: Tensor  #: ``[tiles, rows, cols]``
    shape: tuple[int, int]


def to_blocks(dense: Tensor, rows: int, cols: int) -> Blocks:
    """``dense [out, in]`` -> its tiles that hold anything but zero. Raises LayerError where the shape does not divide.

    >>> to_blocks(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), 2, 1).values.flatten().tolist()
    [1.0, 2.0]
    """
    if dense.dim() != 2 or rows < 1 or cols < 1 or dense.shape[0] % rows or dense.shape[1] % cols:
        raise LayerError(f"a tensor of shape {tuple(dense.shape)} does not divide into tiles of {rows} x {cols}")
    tall, wide = dense.shape[0] // rows, dense.shape[1] // cols
    tiles = dense.detach().reshape(tall, rows, wide, cols).transpose(1, 2)
    kept = (tiles != 0).any(dim=3).any(dim=2)
    indptr = torch.zeros(tall + 1, dtype=torch.int64)
    torch.cumsum(kept.sum(dim=1), 0, out=indptr[1:])
    return Blocks(indptr, kept.nonzero()[:, 1], tiles[kept], (dense.shape[0], dense.shape[1]))


def from_blocks(blocks: Blocks) -> Tensor:
    """The inverse of `to_blocks`. Raises LayerError where pointers or columns are out of range."""
    rows, cols = blocks.values.shape[1:]
    tall, wide = blocks.shape[0] // rows, blocks.shape[1] // cols
    counts = blocks.indptr.diff()
    if (
        len(counts) != tall
        or bool((counts < 0).any())
        or int(blocks.indptr[0])
        or int(blocks.indptr[-1]) != len(blocks.indices)
    ):
        raise LayerError(f"block pointers of {tall} rows of tiles must rise from 0 to the {len(blocks.indices)} tiles stored")
    if len(blocks.indices) and not 0 <= int(blocks.indices.min()) <= int(blocks.indices.max()) < wide:
        raise LayerError(f"block columns must be in [0, {wide})")
    tiles = blocks.values.new_zeros(tall, wide, rows, cols)
    tiles[torch.repeat_interleave(torch.arange(tall), counts), blocks.indices] = blocks.values
    return tiles.transpose(1, 2).reshape(blocks.shape)


def stored_fraction(dense: Tensor, rows: int, cols: int) -> float:
    """Fraction of the matrix that tiles of `rows` x `cols` must store; 1.0 where the shape does not divide."""
    if dense.shape[0] % rows or dense.shape[1] % cols:
        return 1.0
    kept = (dense != 0).reshape(dense.shape[0] // rows, rows, dense.shape[1] // cols, cols).any(dim=3).any(dim=1)
    return float(kept.float().mean()) if kept.numel() else 1.0
