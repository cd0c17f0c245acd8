"""Matrix products that need not be exact: in bfloat16 where the processor has instructions for it, else in float32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _cpu_is_faster() -> bool:
    """Whether bfloat16 is native to this processor: without that it is emulated, and slower than float32."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def fast(matrix: Tensor) -> Tensor:
    """`matrix` in the type in which this device multiplies fastest with at least 8 bits of mantissa."""
    return matrix.bfloat16() if matrix.is_cuda or _cpu_is_faster() else matrix.float()


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, both rounded to the type of `right` before they are multiplied."""
    return (left.to(right.dtype) @ right).float()
