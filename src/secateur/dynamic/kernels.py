"""When the compiled kernels that read only chosen rows serve, and the layout they need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.runtime import native


def by_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight`, rows of which are chosen, and one vector `x` are such that the kernels can be used.

    More vectors at a time read more of the weight together than each of them alone: dense products serve them better.
    """
    return (
        x.numel() == x.shape[-1]
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
        and native.gathers()
    )


def turn(weight: nn.Parameter) -> None:
    """Lay a weight ``[out, in]`` out column by column, in place: values, shape and what computes with it stay the same."""
    weight.data = weight.data.t().contiguous().t()
