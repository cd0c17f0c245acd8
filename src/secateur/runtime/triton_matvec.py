"""One to sixteen vectors times a bitmask matrix on GPUs, in Triton: memory-bound, so weights stay compressed on the way in.

It needs the `triton` package, which comes with torch for CUDA. With TRITON_INTERPRET=1 in the environment the same kernel runs
on the CPU, slowly, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import LayerError

MOST_VECTORS = 16
CHUNK = 512  #: columns that one program spreads at a time; where the values of each chunk start is stored
_ROWS = 4  #: rows of one program
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Packed(NamedTuple):
    """A matrix ``[out, in]`` as bits and kept values."""

    mask: Tensor  #: int32 ``[out, chunks * CHUNK / 32]``: bit c % 32 of word c // 32 says whether column c is kept
    starts: Tensor  #: int32 ``[out, chunks]``: where the values of a row's chunk start
    values: Tensor  #: ``[kept]``, row by row


def pack(weight: Tensor) -> Packed:
    """``weight [out, in]`` -> its packed form on the same device. Raises LayerError for 2^31 values or more."""
    rows, columns = weight.shape
    chunks = -(-columns // CHUNK)
    kept = torch.zeros(rows, chunks * CHUNK, dtype=torch.bool, device=weight.device)
    kept[:, :columns] = weight != 0
    counts = kept.view(rows, chunks, CHUNK).sum(dim=2).flatten()
    ends = counts.cumsum(0)
    if weight.numel() and int(ends[-1]) >= 2**31:
        raise LayerError(f"the kernel counts values with 31 bits, the weight keeps {int(ends[-1])}")
    powers = torch.ones(32, dtype=torch.int64, device=weight.device) << torch.arange(32, device=weight.device)
    words = (kept.view(rows, chunks * CHUNK // 32, 32) * powers).sum(dim=2)
    mask = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)  # the same bits, signed
    return Packed(mask, (ends - counts).to(torch.int32).view(rows, chunks), weight[kept[:, :columns]].contiguous())


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        x, mask, starts, values, bias, y, rows, columns, chunks, vectors,
        ROWS: tl.constexpr, WORDS: tl.constexpr, VECTORS: tl.constexpr, BIASED: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        live = row < rows
        vector = tl.arange(0, VECTORS)
        total = tl.zeros([ROWS, VECTORS], tl.float32)
        for chunk in range(0, chunks):
            word = chunk * WORDS + tl.arange(0, WORDS)
            bits = tl.load(mask + row[:, None] * (chunks * WORDS) + word[None, :], mask=live[:, None], other=0)
            kept = tl.reshape((bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, [ROWS, WORDS * 32])
            place = tl.cumsum(kept, 1) - kept
            first = tl.load(starts + row * chunks + chunk, mask=live, other=0)
            w = tl.load(values + first[:, None] + place, mask=kept != 0, other=0.0).to(tl.float32)
            column = chunk * WORDS * 32 + tl.arange(0, WORDS * 32)
            for v in tl.static_range(VECTORS):
                known = (column < columns) & (column * 0 + v < vectors)
                xs = tl.load(x + v * columns + column, mask=known, other=0.0).to(tl.float32)
                total += tl.where(vector[None, :] == v, tl.sum(w * xs[None, :], axis=1)[:, None], 0.0)
        if BIASED:
            total += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)[:, None]
        tl.store(y + vector[None, :] * rows + row[:, None], total, mask=live[:, None] & (vector < vectors)[None, :])

    return kernel


def matvec(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]`` of at most 16 rows -> ``x @ W.T + bias [..., out]``, summed in float32, in the dtype of x.

    Raises LayerError for more rows and where devices or dtypes differ.
    """
    rows, columns = packed.mask.shape[0], x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), columns).contiguous()
    chunks = packed.starts.shape[1]
    if flat.shape[0] > MOST_VECTORS:
        raise LayerError(f"the matrix-vector kernel takes at most {MOST_VECTORS} rows of activations, got {flat.shape[0]}")
    if x.dtype not in DTYPES or x.dtype != packed.values.dtype or x.device != packed.values.device:
        raise LayerError(f"activations {x.dtype} on {x.device} do not go with {packed.values.dtype} on {packed.values.device}")
    if -(-columns // CHUNK) != chunks:
        raise LayerError(f"activations of {columns} columns do not go with a weight of {chunks} chunks of {CHUNK} columns")
    y = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    if y.numel():
        vectors = 1 << (flat.shape[0] - 1).bit_length()
        _kernel()[(-(-rows // _ROWS),)](
            flat, packed.mask, packed.starts, packed.values, bias if bias is not None else flat, y, rows, columns, chunks,
            flat.shape[0], ROWS=_ROWS, WORDS=CHUNK // 32, VECTORS=vectors, BIASED=bias is not None,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], rows)


class TritonLinear(nn.Module):
    """A linear layer of few rows at a time whose weight is kept as bits and values; no gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = pack(weight.detach())
        self.register_buffer("mask", packed.mask)
        self.register_buffer("starts", packed.starts)
        self.register_buffer("values", packed.values)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` for at most 16 rows."""
        parts: Any = (self.mask, self.starts, self.values)
        return matvec(x, Packed(*parts), self.bias)  # type: ignore[arg-type]
