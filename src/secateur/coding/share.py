"""Weight sharing: the kept weights of a layer take the value of their cluster, and removed ones stay zero."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.coding.kmeans import Init, kmeans, nearest


def shared(weight: Tensor, bits: float, init: Init = "linear", seed: int = 0) -> Tensor:
    """`weight` with at most ``2^bits`` different values, 0 among them where it occurs, rounded to bfloat16.

    The rounding halves the codebook and is far below what sharing itself changes. A centroid that would round to 0 keeps
    its float32 value, so that no kept weight vanishes.

    >>> shared(torch.tensor([0.0, 0.5, 0.53125, -1.0]), 1.585)
    tensor([ 0.0000,  0.5156,  0.5156, -1.0000])
    """
    flat = weight.detach().float().cpu().reshape(-1)
    kept = flat[flat != 0].numpy()
    whole = round(2.0**bits) - int(len(kept) < flat.numel())
    if not len(kept):
        return weight.detach().clone()
    centroids = kmeans(kept, max(1, whole), init, seed)
    book = rounded_book(torch.from_numpy(centroids).float())
    result = torch.zeros_like(flat)
    result[flat != 0] = book[torch.from_numpy(nearest(kept, centroids).astype(np.int64))]
    return result.reshape(weight.shape).to(weight.dtype).to(weight.device)


def rounded_vector(vector: Tensor) -> Tensor:
    """`vector` in float32 rounded to float16, where that changes no value by more than a thousandth of itself."""
    if vector.dtype != torch.float32:
        return vector.detach().clone()
    half = vector.detach().half().float()
    near = (half - vector).abs() <= vector.abs() / 1000
    return half if bool((near & half.isfinite()).all()) else vector.detach().clone()


def rounded_book(book: Tensor) -> Tensor:
    """`book` rounded to bfloat16, in its own dtype; a value that would round to 0 is kept."""
    short = book.bfloat16().to(book.dtype)
    return torch.where((short == 0) & (book != 0), book, short)
