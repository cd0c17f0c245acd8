"""Layer-adaptive magnitude (LAMP): the arithmetic that the criterion and the allocation of that name share."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20


def lamp_scores(squared: Tensor) -> Tensor:
    """``w_u^2 / sum of w_v^2 over the weights v that are kept at least as long as u`` of one layer, Lee et al. 2021, eq. 2.

    `squared [n]` holds the squared weights of the layer, flat; the result is ``[n]``, float32, in [0, 1]. Among equal weights
    the one of lower index is kept longer, as in `secateur.select`, so it has the higher score. The largest weight scores 1,
    whatever the layer; an all-zero layer scores 0. The running sum is float64, and it and the quotients are formed in chunks,
    so that the peak is one sort.

    >>> lamp_scores(torch.tensor([1.0, 4.0, 4.0, 0.0]))
    tensor([0.1111, 1.0000, 0.5000, 0.0000])
    """
    if squared.dim() != 1:
        raise ValueError(f"lamp_scores takes a flat tensor, got shape {tuple(squared.shape)}")
    values, order = torch.sort(squared, descending=True, stable=True)
    scores = torch.empty_like(squared, dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=squared.device)
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK].double()
        kept = part.cumsum(0).add_(total)
        total = kept[-1]
        # A sum of zero means that every weight so far is zero: dividing by one scores them 0.
        scores[order[start : start + _CHUNK]] = (part / kept.masked_fill(kept == 0, 1)).float()
    return scores
